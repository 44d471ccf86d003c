"""Masks over a grid of patches, drawn in the data workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data_pipeline.order import fold, permute


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator, smallest: int = 4) -> np.ndarray:
    """bool [h, w] with exactly `count` patches set: rectangles as in BEiT (arXiv 2106.08254), aspect 0.3 to 3.3, then single patches."""
    height, width = grid
    mask = np.zeros(grid, bool)
    largest = height * width / 2
    while (missing := count - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(smallest, max(smallest, min(missing, largest)))
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            new = h * w - int(mask[top : top + h, left : left + w].sum())
            if 0 < new <= missing:
                mask[top : top + h, left : left + w] = True
                break
        else:
            free = np.flatnonzero(~mask.reshape(-1))
            mask.reshape(-1)[rng.choice(free, missing, replace=False)] = True
    return mask


def stratified_ratio(sample: dict[str, Any], view: int, views: int, share: float, ratios: tuple[float, float]) -> float:
    """The mask ratio of one view of a sample: over the global batch, a `share` of the views get ratios spread evenly over `ratios`, the rest 0.

    Which view gets which is a keyed permutation of the step, so it does not depend on how the batch is spread over processes.
    """
    total = sample["batch"] * views
    key = fold(sample["seed"], 3, sample["step"])
    place = int(permute(np.array([sample["slot"] * views + view]), total, key)[0])
    masked = int(share * total)
    low, high = ratios
    return low + (high - low) * (place + 1) / masked if place < masked else 0.0
