"""Random masks over a grid of patches, and regions of pixels, drawn in the data workers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from data_pipeline.order.permutation import hash_to_key, permute
from data_pipeline.views.augmentations import generators

# Numbers that are hashed into the keys of a step, so that these differ from each other and from other keys of the seed.
MASK_RATIO_KEY, BLOCK_SIZE_KEY = 3, 12
MAX_DRAWS = 20  # of the blocks of a sample, until enough patches lie in the context and in no target
Range = tuple[float, float]


def block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator, smallest: int = 4) -> np.ndarray:
    """bool [h, w] with exactly `count` patches set: rectangles of aspect 0.3 to 3.3 as in BEiT (arXiv 2106.08254), then
    single patches for the rest.
    """
    height, width = grid
    mask = np.zeros(grid, bool)
    largest = height * width / 2
    while (missing := count - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(*area_limits(smallest, min(missing, largest)))
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


def area_limits(smallest: float, available: float) -> tuple[float, float]:
    """The limits between which the area of a rectangle is drawn, in patches. `available`: the number of patches that
    are still missing, at most half the grid. If it is less than `smallest`, it is the lower limit, as in BEiT's
    code."""
    return min(smallest, available), max(smallest, available)


def central_region(size: int, side: int) -> np.ndarray:
    """bool [size, size], true in the central square of `side` pixels."""
    region, first = np.zeros((size, size), bool), (size - side) // 2
    region[first : first + side, first : first + side] = True
    return region


def random_region(size: int, share: float, rng: np.random.Generator, cells: float = 7.68) -> np.ndarray:
    """bool [size, size], true at exactly int(share · size²) pixels, which form connected shapes: those where a noise
    is lowest that has `cells` cells along the region's side, and that is cut out at a random place of a larger one. In
    the code published for arXiv 1604.07379, cells have 16.7 of 128 pixels, and the number of pixels varies by a fifth."""
    count = math.ceil(cells) + 1
    whole = math.ceil(count * size / cells)
    noise = cv2.resize(rng.random((count, count), np.float32), (whole, whole), interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(0, whole - size + 1, 2)
    noise = noise[top : top + size, left : left + size]
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


def square_mask(grid: tuple[int, int], cells: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """bool [h · cells, w · cells] with `count` of the h × w squares of `cells` × `cells` patches set, drawn uniformly
    (SimMIM, arXiv 2111.09886)."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[rng.choice(mask.size, count, replace=False)] = True
    return np.kron(mask.reshape(grid), np.ones((cells, cells), bool))


def block_size(grid: tuple[int, int], share: Range, aspect: Range, rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) of a block with a share of the area of `grid` and a ratio of height to width that are drawn
    uniformly from their ranges."""
    area, ratio = grid[0] * grid[1] * rng.uniform(*share), rng.uniform(*aspect)
    wanted = math.sqrt(area * ratio), math.sqrt(area / ratio)
    height, width = (min(max(1, round(side)), most) for side, most in zip(wanted, grid, strict=True))
    return height, width


@functools.lru_cache(64)
def block_size_of_step(grid: tuple[int, int], share: Range, aspect: Range, seed: int, step: int) -> tuple[int, int]:
    """The `block_size` that all samples of a step have. It depends on (seed, step) only, and is therefore the same in all
    processes."""
    return block_size(grid, share, aspect, generators((hash_to_key(seed, BLOCK_SIZE_KEY, step), 0))(0))


def place_block(grid: tuple[int, int], size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """bool [h, w] with a block of (height, width) at a uniformly drawn place."""
    top, left = (int(rng.integers(0, most - side + 1)) for side, most in zip(size, grid, strict=True))
    mask = np.zeros(grid, bool)
    mask[top : top + size[0], left : left + size[1]] = True
    return mask


def visible_block(
    grid: tuple[int, int], count: int, rng: np.random.Generator, aspect: Range = (0.5, 2.0)
) -> np.ndarray:
    """bool [h, w] with exactly `count` patches set, a rectangle that is rolled: what leaves the grid on one side enters
    it on the other one. The others are the inverse block mask of CAPI (arXiv 2502.08769).

    The logarithm of height / width is uniform in the range of `aspect`, or where the rectangle fits into the grid. The
    end of its last row is left out if it has more than `count` patches.
    """
    height, width = grid
    low, high = max(aspect[0], count / width**2), min(aspect[1], height**2 / count)
    ratio = math.exp(rng.uniform(math.log(low), math.log(max(low, high))))
    rows, columns = (math.ceil(math.sqrt(count * r) - 1e-9) for r in (ratio, 1 / ratio))
    block = np.zeros(grid, bool)
    block[: min(rows, height), : min(columns, width)] = True
    mask = np.zeros(height * width, bool)
    mask[np.flatnonzero(block)[:count]] = True
    return np.roll(mask.reshape(grid), (int(rng.integers(height)), int(rng.integers(width))), (0, 1))


@dataclass(frozen=True)
class ContextAndTargets:
    """The multi-block masks of I-JEPA (arXiv 2301.08243 §3, fig. 4) as indices of patches: {"context": int64 [K],
    "targets": int64 [M, n]}.

    The M targets are blocks that may overlap. The context is K patches of a large square block that lie in no target.
    The size of the targets is drawn for each step, so that all samples of a step have the same n. In the published code
    K is the smallest number of a GPU's batch, and depends on the number of GPUs; here it is fixed. Blocks are drawn
    again while fewer than K patches are left; if they still are after MAX_DRAWS, patches outside of the large block are
    taken, too, and in the end patches of targets.
    """

    grid: tuple[int, int]
    count: int  # M
    share: Range  # of a target's area in that of the grid
    aspect: Range  # height of a target / width
    context_area: Range  # the context block's share of the grid's area
    context_patches: int  # K

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        size = block_size_of_step(self.grid, self.share, self.aspect, sample["seed"], sample["step"])
        for _ in range(MAX_DRAWS):
            targets = np.stack([place_block(self.grid, size, rng).reshape(-1) for _ in range(self.count)])
            block = block_size(self.grid, self.context_area, (1.0, 1.0), rng)
            inside, taken = place_block(self.grid, block, rng).reshape(-1), targets.any(0)
            if (inside & ~taken).sum() >= self.context_patches:
                break
        preference = rng.random(len(taken)) + np.where(taken, 2, np.where(inside, 0, 1))
        context = np.sort(preference.argsort()[: self.context_patches])
        return {"context": context, "targets": np.stack([np.flatnonzero(target) for target in targets])}
