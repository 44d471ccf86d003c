"""Random masks over a grid of patches, and regions of pixels, drawn in the data workers."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from data_pipeline.order.permutation import hash_to_key, permute

MASK_RATIO_KEY = 3  # hashed into the key of the permutation, so that it differs from other keys of the seed


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


def central_region(size: int, side: int) -> np.ndarray:
    """bool [size, size], true in the central square of `side` pixels."""
    region, first = np.zeros((size, size), bool), (size - side) // 2
    region[first : first + side, first : first + side] = True
    return region


def random_region(size: int, share: float, rng: np.random.Generator, grain: float = 16) -> np.ndarray:
    """bool [size, size], true at exactly int(share · size²) pixels, which form connected shapes: those where a noise
    with cells of `grain` pixels is lowest, as in the code published for arXiv 1604.07379."""
    cells = math.ceil(size / grain) + 1
    noise = cv2.resize(rng.random((cells, cells), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    region = np.zeros(size * size, bool)
    region[noise.reshape(-1).argsort(kind="stable")[: int(share * size * size)]] = True
    return region.reshape(size, size)


def grown(region: np.ndarray, pixels: int) -> np.ndarray:
    """A region bool [H, W] with all pixels at most `pixels` away from it along each axis."""
    square = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    return cv2.dilate(region.astype(np.uint8), square).astype(bool)


def stratified_ratio(sample: dict[str, Any], view: int, views: int, share: float, ratios: tuple[float, float]) -> float:
    """The mask ratio of one view of a sample. In the global batch, a `share` of all views is masked, with ratios that
    are spread evenly over `ratios`; the ratio of the others is 0.

    A permutation that is keyed by the step assigns the ratios to the views. So they do not depend on the number of
    processes.
    """
    total = sample["batch"] * views
    key = hash_to_key(sample["seed"], MASK_RATIO_KEY, sample["step"])
    rank = int(permute(np.array([sample["slot"] * views + view]), total, key)[0])
    masked = int(share * total)
    low, high = ratios
    return low + (high - low) * (rank + 1) / masked if rank < masked else 0.0


def masked_patches(mask: np.ndarray) -> dict[str, np.ndarray]:
    """The positions and weights of the masked patches of masks bool [..., N]. A loss gets them with the batch, because
    computing them on the device would be a host sync:

    mask_indices  int64 [M]    the masked patches among all patches of the batch, in order
    mask_weight   float32 [M]  1 / (number of masked patches in the same crop)
    """
    rows = mask.reshape(-1, mask.shape[-1])
    counts = rows.sum(1)  # [crops]
    weights = np.float32(1) / counts.clip(1).astype(np.float32)
    return {"mask_indices": np.flatnonzero(rows), "mask_weight": np.repeat(weights, counts)}


def resize_mask(mask: np.ndarray, grid: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Resize masks bool [B, h·w] of `grid` to [B, h'·w'] of `target`. A new cell has the value of the cell that
    contains its centre."""
    rows, columns = ((2 * np.arange(t) + 1) * g // (2 * t) for g, t in zip(grid, target, strict=True))
    return mask.reshape(-1, *grid)[:, rows[:, None], columns].reshape(len(mask), -1)
