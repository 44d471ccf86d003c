"""Print the input of a recipe's text model: some rows of the first batches as text, document by document, in which the
tokens that the model has to predict are marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

from data_pipeline.shards.token_rows import IGNORED
from launch.preview import small
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import check_data

Decode = Callable[[np.ndarray], str]


def preview(recipe: Recipe, rows: int = 8) -> list[str]:
    """The lines to print for `rows` rows from the first batches of the training. Raises UserError.

    ‹…› is a token that a causal model does not predict; ⟦a→b⟧ is a masked token: the model reads a and predicts b.
    """
    check_data(recipe)
    samples = open_samples(recipe)
    with torch.device("meta"):  # views depend on options and shapes only, so the weights need no memory
        objective = build_objective(recipe)
    recipe = small(recipe, sum(map(len, samples)))
    stream = build_stream(recipe, objective, samples)
    tokenizer = samples[0].vocabulary.tokenizer()  # type: ignore[union-attr]
    out: list[str] = []
    for _ in range(-(-rows // recipe.data.batch_size)):
        batch = {key: value.numpy() for key, value in next(stream).items()}
        for n in range(min(recipe.data.batch_size, rows)):
            out.append(f"row {int(batch['id'][n])}")
            sample = {key: value[n] for key, value in batch.items()}
            out += lines(sample, lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False))
        rows -= recipe.data.batch_size
    stream.close()
    return out


def lines(sample: dict[str, np.ndarray], decode: Decode) -> Iterator[str]:
    """The lines for one row of a batch: one for each document, and one for the targets of the decoder if there is one
    (T5)."""
    tokens = sample["tokens"]
    documents = sample.get("documents", np.zeros(len(tokens), np.int32))
    has_decoder = "decoder_tokens" in sample
    masked_targets = None if has_decoder else _masked_targets(sample)
    bounds = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(tokens)]
    for begin, end in pairwise(bounds):
        if documents[begin] < 0:
            yield f"  {end - begin} tokens of padding"
            continue
        part = tokens[begin:end]
        text = decode(part) if has_decoder else _causal(part, decode)
        targets = sample.get("targets")
        causal = not has_decoder and masked_targets is None
        if causal and end < len(tokens) and targets is not None and targets[end - 1] != IGNORED:
            text += decode(targets[end - 1 : end])  # the token that ends this document begins the next one
        if masked_targets is not None:
            text = _masked(part, masked_targets[begin:end], decode)
        yield f"  document {documents[begin]}, {end - begin} tokens: {text!r}"
    if has_decoder:
        targets = sample["targets"]
        yield f"  targets, {int((targets >= 0).sum())} tokens: {decode(targets[targets >= 0])!r}"


def _masked_targets(sample: dict[str, np.ndarray]) -> np.ndarray | None:
    """The target at the position of each token, [T], for a model that predicts masked tokens; None for a causal model,
    whose targets are the next tokens."""
    tokens, targets = sample["tokens"], sample.get("targets")
    if targets is None:
        return None
    if "places" in sample:  # positions of the targets; every row has the same number, and some targets are IGNORED
        out = np.full(len(tokens), IGNORED)
        out[sample["places"][targets != IGNORED]] = targets[targets != IGNORED]
        return out
    documents = sample.get("documents", np.zeros(len(tokens), np.int32))
    counted = targets[:-1] != IGNORED
    inside = counted & (documents[1:] == documents[:-1])
    causal = not counted.any() or (inside.any() and (targets[:-1] == tokens[1:])[inside].all())
    return None if causal else targets


def _causal(tokens: np.ndarray, decode: Decode) -> str:
    """A document as text. Its first token is marked, because no model predicts a token without previous tokens."""
    return f"‹{decode(tokens[:1])}›{decode(tokens[1:])}"


def _masked(tokens: np.ndarray, targets: np.ndarray, decode: Decode) -> str:
    """A document as text, with every masked token and its target marked."""
    out, at = "", 0
    for n in np.flatnonzero(targets >= 0).tolist():
        out += decode(tokens[at:n]) + f"⟦{decode(tokens[n : n + 1])}→{decode(targets[n : n + 1])}⟧"
        at = n + 1
    return out + decode(tokens[at:])
