"""Views of videos: clips at random times, each with a crop and colours that are the same in all of its frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.views.augmentations import Augment, Rng, crops

CLIPS = 2000  # the number of the generator that draws the times of clips


def clip_crops(sample: Mapping[str, Any], augment: Augment, count: int, rng: Rng) -> dict[str, np.ndarray]:
    """`count` clips of `sample["clip"]`, from one decoding of the video: {"clip": uint8 [n, T, C, size, size]}, and
    "clip.color" as for `crops`. View n has the generator n. Raises `Damaged`."""
    color = sample.get("color") or sample["clip"].color
    views = [
        crops({"image": frames, "color": color}, {"clip": augment}, _from(rng, n))
        for n, frames in enumerate(sample["clip"].drawn(count, rng(CLIPS)))
    ]
    return {key: np.stack([view[key] for view in views]) for key in views[0]}


def _from(rng: Rng, first: int) -> Rng:
    """The generators from number `first` on."""
    return lambda number: rng(first + number)
