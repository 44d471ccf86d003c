"""What a recipe's model reads: images, or rows of tokens. The datasets that fit it, and what the objective's views have to know of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipeline.rows import Rows
from data_pipeline.shards import Samples
from data_pipeline.tokens import holds_tokens
from data_pipeline.vocabulary import Vocabulary
from pretrain.config import ConfigError
from pretrain.models.layers import Backbone
from pretrain.models.text_layers import TextBackbone
from pretrain.objectives.base import Objective
from pretrain.recipe import Recipe, is_text

ROUND = 64  # a vocabulary's rows in a model are a multiple of it: quicker products

Dataset = Samples | Rows


def open_samples(cfg: Recipe) -> list[Samples] | list[Rows]:
    """The datasets of a recipe: one, or those that it mixes. Raises UserError where they are not what its model reads."""
    specs = [source.shards for source in cfg.data.mix] or [cfg.data.train]
    if not is_text(cfg):
        return [_images(cfg, Samples(some)) for some in specs]
    length, data = length_of(cfg), cfg.data
    rows = [Rows(some, length, data.packing, data.document_mask) for some in specs]
    for held in rows[1:]:
        if held.blocks.hash != rows[0].blocks.hash:
            raise ConfigError(
                f"data.mix: {rows[0].names} and {held.names} were made with different tokenizers;"
                f" tokenize one again with --tokenizer {rows[0].url(0).rpartition('/')[0]}/tokenizer.json"
            )
    vocabulary, rooms = rows[0].vocabulary, cfg.model.vocab_size  # type: ignore[attr-defined]
    if vocabulary.size > rooms:
        raise ConfigError(
            f"model.vocab_size = {rooms}: the tokenizer of {rows[0].names} has {vocabulary.size} tokens;"
            f" write model.vocab_size={-(-vocabulary.size // ROUND) * ROUND}"
        )
    return rows


def length_of(cfg: Recipe) -> int:
    """T, the tokens of a row that are inputs."""
    length, context = cfg.data.length, cfg.model.context  # type: ignore[attr-defined]
    if length is None:
        return context
    if not 1 <= length <= context:
        raise ConfigError(
            f"data.length = {length}: must be 1 or more and at most model.context = {context}; write null for that, or model.context={length}"
        )
    return length


def inputs(cfg: Recipe, body: Backbone, samples: Sequence[Dataset] | None = None) -> tuple[Any, ...]:
    """What `Objective.views` gets after its own options: (image_size, patch_size), or (T, vocabulary, document_mask) for text.

    Without `samples`, as for a plan, the vocabulary is as large as the model's, and stands in for the tokenizer's.
    """
    if not isinstance(body, TextBackbone):
        return body.image_size, body.patch_size
    first = samples[0] if samples else None
    vocabulary = first.vocabulary if isinstance(first, Rows) else Vocabulary.standing_in(body.vocab_size)
    return length_of(cfg), vocabulary, cfg.data.document_mask


def views(cfg: Recipe, objective: Objective, samples: Sequence[Dataset] | None = None) -> Callable[..., dict]:
    """What makes one sample's part of a batch for the objective's model. Raises ConfigError for sizes that do not fit it."""
    try:
        return type(objective).views(cfg.objective, *inputs(cfg, objective.encoder(), samples))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def of_noise(cfg: Recipe, objective: Objective, count: int) -> list[dict[str, np.ndarray]]:
    """What the objective's views make of `count` images or rows that hold nothing: a batch where there are no data."""
    make, rng = views(cfg, objective), np.random.default_rng(0)
    parts = []
    for n in range(count):
        sample = {
            **_noise(cfg, objective.encoder(), rng),
            "id": n,
            "epoch": 0,
            "slot": n,
            "batch": count,
            "step": 0,
            "seed": cfg.seed,
        }
        parts.append(make(sample, lambda k, n=n: np.random.default_rng([n, k])))
    return parts


def _noise(cfg: Recipe, body: Backbone, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if is_text(cfg):
        tokens = rng.integers(4, body.vocab_size, length_of(cfg) + 1)  # type: ignore[attr-defined]
        return {"tokens": tokens, "documents": np.zeros(len(tokens), np.int32)}
    side = max(64, int(1.2 * body.image_size))
    return {"image": rng.integers(0, 256, (side, side, cfg.model.in_channels), dtype=np.uint8)}  # type: ignore[attr-defined]


def check(cfg: Recipe, kind: type[Objective]) -> None:
    """Refuse a model that reads something else than the objective trains on."""
    if (kind.reads == "text") != is_text(cfg):
        here, there = ("images", "text") if kind.reads == "text" else ("text", "images")
        raise ConfigError(
            f"objective.name = {cfg.objective.name}: trains on {there}, but model.name = {cfg.model.name} reads {here};"
            f" choose a model for {there} (`unlabeled recipes` shows pairs that go together)"
        )


def _images(cfg: Recipe, samples: Samples) -> Samples:
    if any(holds_tokens(part.manifest) for part in samples.manifests):
        raise ConfigError(
            f"{samples.names}: holds tokens, but model.name = {cfg.model.name} reads images; name shards of images, or a model for text"
        )
    return samples
