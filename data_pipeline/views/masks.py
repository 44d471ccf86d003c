"""Random masks over a grid of patches, drawn in the data workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data_pipeline.order.permutation import hash_to_key, permute


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator, smallest: int = 4) -> np.ndarray:
    """bool [h, w] with exactly `count` patches set: rectangles of aspect 0.3 to 3.3 as in BEiT (arXiv 2106.08254), then
    single patches for the rest.
    """
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
    """The mask ratio of one view of a sample. Over the global batch, a `share` of the views get ratios spread evenly
    over `ratios`, the others 0.

    Which view gets which ratio follows from a permutation keyed by the step, so it does not depend on the number of
    processes.
    """
    total = sample["batch"] * views
    key = hash_to_key(sample["seed"], 3, sample["step"])
    place = int(permute(np.array([sample["slot"] * views + view]), total, key)[0])
    masked = int(share * total)
    low, high = ratios
    return low + (high - low) * (place + 1) / masked if place < masked else 0.0


def masked_patches(mask: np.ndarray) -> dict[str, np.ndarray]:
    """What a loss on masked patches has to know of masks bool [..., N], so that the device is not asked how many there
    are:

    mask_indices  int64 [M]    the masked patches among all patches of the batch, in order
    mask_weight   float32 [M]  1 / (number of masked patches in the same crop)
    """
    rows = mask.reshape(-1, mask.shape[-1])
    counts = rows.sum(1)
    each = np.float32(1) / counts.clip(1).astype(np.float32)
    return {"mask_indices": np.flatnonzero(rows), "mask_weight": np.repeat(each, counts)}


def resize_mask(mask: np.ndarray, grid: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Masks bool [B, h·w] of a grid for another one, [B, h'·w']: a cell has the value of the cell under its centre."""
    rows, columns = ((2 * np.arange(t) + 1) * g // (2 * t) for g, t in zip(grid, target, strict=True))
    return mask.reshape(-1, *grid)[:, rows[:, None], columns].reshape(len(mask), -1)
