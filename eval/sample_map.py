"""The section of the report with a map of the features of texts, clips or recordings of several classes, which has
points for samples because these cannot be shown as small pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import Damaged, DataError
from data_pipeline.shards.samples import Samples
from eval import feature_map
from eval.features import open_encoder
from eval.report_images import checkpoint_name
from eval.report_page import section
from pretrain.recipes.recipe import Recipe

MAX_SAMPLES = {"texts": 256, "recordings": 256, "clips": 64}  # on the map, by the word for samples
BATCH = 16  # samples that are encoded together


def sample_map(recipe: Recipe, exports: Mapping[int, Path], last: Any, device: str) -> str:
    """The map at the first and the last checkpoint, of labelled test or validation data that the recipe names; "" if it
    names none. `exports`: {step: folder}; `last`: the encoder of the last one."""
    shards = recipe.eval.test or recipe.eval.val
    if not shards or recipe.model.writes:
        return ""
    samples = last.check(shards)
    cards = []
    for step in sorted({min(exports), max(exports)}):
        encoder = last if step == max(exports) else open_encoder(str(exports[step]), recipe.eval.image_size, device)[0]
        features, labels = features_of(encoder, samples)
        if len({*labels}) < 2:
            return ""
        cards.append(feature_map.points(checkpoint_name(step), feature_map.positions(features), labels))
    text = (
        f"t-SNE of the pooled features of {len(labels):,} {last.unit}: those with similar features are close together."
        " Distances between groups, and the directions, have no meaning."
    )
    return section("Map of the features", text, *cards, columns="420px")


def features_of(encoder: Any, samples: Samples) -> tuple[Tensor, list[str]]:
    """(features [N, D], labels) of labelled samples that are evenly spaced over the set. Raises DataError if none of
    those that were tried can be read."""
    inputs, labels, parts = [], [], []
    count = min(len(samples), MAX_SAMPLES[encoder.unit])
    for number in np.linspace(0, len(samples) - 1, count).round().astype(int).tolist():
        try:
            label, value = encoder.label(samples, number), encoder.read(samples, number)
        except Damaged:
            continue
        labels.append(label)
        inputs.append(value)
    if not inputs:
        raise DataError(f"{samples.names}: none of the samples that were tried can be read and has a label")
    for first in range(0, len(inputs), BATCH):
        parts.append(encoder.pooled(inputs[first : first + BATCH]))
    return torch.cat(parts), labels
