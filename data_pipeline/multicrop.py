"""Multi-crop views with block masks, as DINO, DINOv2 and DINOv3 train on: two global crops, n local ones, masks, and for Gram anchoring the global
crops once more, larger and without changed colours.

`cfg` is an objective's Config with the fields that `multicrop` reads. Shapes: G = 2 global and L local crops, N patches of a global crop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipeline.masks import block_mask, stratified_ratio
from data_pipeline.order import fold
from data_pipeline.views import MASKS, Augment, Rng, crops

GLOBAL = 2  # crops
Sizes = tuple[int, int, int]  # pixels of a global, a local and a Gram crop; 0: none


def multicrop(
    cfg: Any,
    image_size: int,
    patch_size: int,
    gram_size: int = 0,
    resolutions: list[list[float]] | None = None,
    local_patch: int | None = None,
) -> Callable[[dict[str, Any], Rng], dict[str, np.ndarray]]:
    """The view function: {"global": [G, 3, H, W], "local": [L, 3, h, w], "mask": bool [G, N]} and "gram" [G, 3, S, S] where `gram_size` is given.

    `resolutions`: rows of (global, local, Gram pixels, weight), of which each step takes one, drawn from (seed, step): DINOv3's high-resolution stage.
    `local_patch`: what a local crop has to divide into, where that is not `patch_size`.
    """
    rows = resolutions or [[image_size, cfg.local_size, gram_size, 1.0]]
    _check(rows, patch_size, gram_size > 0, (local_patch or patch_size) if cfg.local_crops else None)
    weights = tuple(row[3] for row in rows)
    sizes = [tuple(map(int, row[:3])) for row in rows]
    augments = [_augments(cfg, size) for size in sizes]
    share, ratios = cfg.mask_share, (cfg.mask_ratio_min, cfg.mask_ratio_max)
    alike = {"gram": "global"} if gram_size else {}

    def view(sample: dict[str, Any], rng: Rng) -> dict[str, np.ndarray]:
        row = pick(sample["seed"], sample["step"], weights)
        side = sizes[row][0] // patch_size
        masks = []
        for i in range(GLOBAL):
            count = int(stratified_ratio(sample, i, GLOBAL, share, ratios) * side * side)
            masks.append(block_mask((side, side), count, rng(MASKS + i)).reshape(-1))
        return crops(sample, augments[row], rng, alike) | {"mask": np.stack(masks)}

    return view


@functools.lru_cache(64)
def pick(seed: int, step: int, weights: tuple[float, ...]) -> int:
    """Which of several kinds a step is, in proportion to their weights: a function of (seed, step), so the same in all processes and after a restart."""
    place = fold(seed, 11, step) / 2**64 * sum(weights)
    return min(int(np.searchsorted(np.cumsum(weights), place, side="right")), len(weights) - 1)


def _check(rows: list[list[float]], patch_size: int, gram: bool, local_patch: int | None) -> None:
    """Raises ValueError for sizes that are no whole patches, or for a Gram crop where there is no Gram teacher. `local_patch`: None for no local crops."""
    for row in rows:
        if len(row) != 4 or row[3] <= 0:
            raise ValueError(
                f"objective.resolutions: {row} must be [global, local, Gram pixels (0: none), weight above 0]"
            )
        for size, patch in ((row[0], patch_size), (row[1], local_patch), (row[2], patch_size if row[2] else None)):
            if patch and (size < patch or size % patch):
                raise ValueError(
                    f"crops of {[int(size) for size in row[:3]]} pixels do not divide into patches of {patch}"
                )
        if gram != (row[2] > 0):
            raise ValueError(
                f"objective.resolutions: {row} must have Gram pixels where, and only where, there is a gram_teacher"
            )


def _augments(cfg: Any, sizes: Sizes) -> dict[str, list[Augment]]:
    wide, small = (cfg.global_scale, 1.0), (cfg.local_scale, cfg.global_scale)
    common = {"jitter": (0.4, 0.4, 0.2, 0.1), "gray": 0.2, "flip": cfg.flip}
    first = Augment(sizes[0], wide, blur=cfg.blur[0], **common)
    second = Augment(sizes[0], wide, blur=cfg.blur[1], solarize=cfg.solarize, **common)
    local = Augment(sizes[1], small, blur=cfg.blur[2], **common)
    out = {"global": [first, second], "local": [local] * cfg.local_crops}
    if sizes[2]:
        out["gram"] = [Augment(sizes[2], wide, flip=cfg.flip)] * GLOBAL
    return out
