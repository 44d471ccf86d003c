"""What a recipe's model will read: some rows of the first batches as text, by document, with what it has to predict marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

from data_pipeline.rows import IGNORED
from pretrain.inputs import open_samples
from pretrain.recipe import Recipe
from pretrain.run_folder import check_data
from pretrain.train import build_objective, build_stream

Decode = Callable[[np.ndarray], str]


def preview(recipe: Recipe, rows: int = 8) -> list[str]:
    """Lines of text for `rows` rows, as the training's first batches have them. Raises UserError.

    Tokens that a causal model is not asked for stand in ‹ ›; ⟦seen→asked⟧ is a masked one.
    """
    check_data(recipe)
    samples = open_samples(recipe)
    with torch.device("meta"):  # the objective's options decide on views; no weights are needed
        objective = build_objective(recipe)
    stream = build_stream(recipe.replace(data=recipe.data.replace(workers=0)), objective, samples)
    tokenizer = samples[0].vocabulary.tokenizer()  # type: ignore[union-attr]
    out: list[str] = []
    for _ in range(-(-rows // recipe.data.batch)):
        batch = {key: value.numpy() for key, value in next(stream).items()}
        for n in range(min(recipe.data.batch, rows)):
            out.append(f"row {int(batch['id'][n])}")
            sample = {key: value[n] for key, value in batch.items()}
            out += lines(sample, lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False))
        rows -= recipe.data.batch
    stream.close()
    return out


def lines(sample: dict[str, np.ndarray], decode: Decode) -> Iterator[str]:
    """One row of a batch: a line for each document, and what a decoder of its own is asked for."""
    tokens = sample["tokens"]
    documents = sample.get("documents", np.zeros(len(tokens), np.int32))
    own = "decoder_tokens" in sample
    targets = None if own else _masked_targets(sample)
    bounds = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(tokens)]
    for begin, end in pairwise(bounds):
        if documents[begin] < 0:
            yield f"  {end - begin} tokens of padding"
            continue
        part = tokens[begin:end]
        text = decode(part) if own else _causal(part, decode)
        if targets is not None:
            text = _masked(part, targets[begin:end], decode)
        yield f"  document {documents[begin]}, {end - begin} tokens: {text!r}"
    if own:
        asked = sample["targets"]
        yield f"  asked for, {int((asked >= 0).sum())} tokens: {decode(asked[asked >= 0])!r}"


def _masked_targets(sample: dict[str, np.ndarray]) -> np.ndarray | None:
    """What is asked for in place of each token, [T]; None where that is the token that follows."""
    tokens, targets = sample["tokens"], sample.get("targets")
    if targets is None:
        return None
    if "places" in sample:  # of the targets, so many in every row that some count for nothing
        out = np.full(len(tokens), IGNORED)
        out[sample["places"][targets != IGNORED]] = targets[targets != IGNORED]
        return out
    asked = targets[:-1] != IGNORED
    return None if (targets[:-1] == tokens[1:])[asked].all() else targets


def _causal(tokens: np.ndarray, decode: Decode) -> str:
    """A document whose first token follows on nothing that may be seen."""
    return f"‹{decode(tokens[:1])}›{decode(tokens[1:])}"


def _masked(tokens: np.ndarray, targets: np.ndarray, decode: Decode) -> str:
    out, at = "", 0
    for n in np.flatnonzero(targets >= 0).tolist():
        out += decode(tokens[at:n]) + f"⟦{decode(tokens[n : n + 1])}→{decode(targets[n : n + 1])}⟧"
        at = n + 1
    return out + decode(tokens[at:])
