"""Masks over the tokens of a clip that are the same at all times, drawn in the data workers: the tubes of VideoMAE, and
the blocks of V-JEPA.

Shapes: a grid of t times and h × w places; K tokens of the context, M targets. Tokens are numbered in the order of
time, row, column.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from data_pipeline.views.augmentations import generators
from data_pipeline.views.masks import MAX_DRAWS, Range, block_size, block_size_of_step, place_block

SIMULATED_DRAWS = 400  # masks from which the fixed numbers of places are determined
LOW_PERCENTILE = 5  # share of the masks, in percent, that have fewer places and are drawn again


def at_all_times(times: int, total: int, places: np.ndarray) -> np.ndarray:
    """The tokens [t · P] at `places` [P] of `total` at each of the times."""
    return (np.arange(times)[:, None] * total + places).reshape(-1)


class BlocksOverTime:
    """The multi-block masks of V-JEPA (arXiv 2404.08471 §3.2): the targets are the union of `count` blocks of places,
    at all times, and the context is the rest.

    As in the published code, the size of the blocks is drawn for each step. There all samples of a GPU's batch are cut
    to the smallest number of tokens in it. Here the numbers of places are fixed, so that they do not depend on the
    number of GPUs: those that 95 % of the masks reach. Masks with fewer are drawn again, and of those with more, random
    places are used.
    """

    def __init__(self, grid: tuple[int, int, int], count: int, share: Range, aspect: Range):
        self.times, self.grid, self.count = grid[0], grid[1:], count
        self.share, self.aspect = share, aspect
        self.total = grid[1] * grid[2]
        rng = generators((0, 0))(0)
        sizes = [block_size(self.grid, share, aspect, rng) for _ in range(SIMULATED_DRAWS)]
        covered = np.array([self._union(size, rng).sum() for size in sizes])
        self.target_places = max(1, int(np.percentile(covered, LOW_PERCENTILE)))
        self.context_places = max(1, self.total - int(np.percentile(covered, 100 - LOW_PERCENTILE)))

    def _union(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """bool [h·w], true in any of the blocks."""
        blocks = [place_block(self.grid, size, rng).reshape(-1) for _ in range(self.count)]
        return np.any(blocks, axis=0)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens of the context, int64 [K], the targets, int64 [M], and the distance of each token of the context
        from the nearest target in places, float32 [K])."""
        size = block_size_of_step(self.grid, self.share, self.aspect, sample["seed"], sample["step"])
        for _ in range(MAX_DRAWS):
            union = self._union(size, rng)
            if self.target_places <= union.sum() <= self.total - self.context_places:
                break
        order = rng.random(self.total)
        context = np.sort((order + union).argsort()[: self.context_places])
        preference = order + ~union
        preference[context] = 2
        targets = np.sort(preference.argsort()[: self.target_places])
        free = np.ones(self.total, np.uint8)
        free[targets] = 0
        distance = cv2.distanceTransform(free.reshape(self.grid), cv2.DIST_L2, cv2.DIST_MASK_PRECISE).reshape(-1)
        context_tokens, target_tokens = (at_all_times(self.times, self.total, places) for places in (context, targets))
        return context_tokens, target_tokens, np.tile(distance[context], self.times)
