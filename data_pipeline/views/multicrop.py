"""Multi-crop views with block masks, for DINO, DINOv2 and DINOv3: two global crops, n local crops, masks, and for Gram
anchoring the global crops once more, larger and without colour operations.

`cfg` is an objective's Config with the fields that `multicrop` reads. Shapes: G = 2 global and L local crops, N patches
of a global crop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.order.permutation import hash_to_key
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.masks import block_mask, masked_patches, resize_mask, stratified_ratio

GLOBAL = 2  # number of global crops
STEP_KIND_KEY = 11  # hashed into the random number of a step, so that it differs from other keys of the seed
PART_OF = {"global": "image", "local": "image", "gram": "image"}  # the part that each entry is made of
Sizes = tuple[int, int, int]  # pixels of a global, a local and a Gram crop; 0: none


@dataclass(frozen=True)
class MultiCropViews:
    """The views of a sample: {"global": [G, 3, H, W], "local": [L, 3, h, w], "mask": bool [G, N]}, and "gram" [G, 3, S,
    S] if there are Gram crops. `collate` adds the positions of the masked patches of a micro-batch.

    `augments`, `sides` (patches along a side of a global crop) and `weights` have one entry for each kind of step.
    `mask_ratios`: None for no masks.
    """

    augments: list[dict[str, list[Augment]]]
    sides: list[int]
    weights: tuple[float, ...]
    mask_share: float
    mask_ratios: tuple[float, float] | None
    same_crops: dict[str, str]  # {entry: the entry whose crops it repeats}
    patch_size: int
    cells: tuple[int, ...] | None

    def __call__(self, sample: dict[str, Any], rng: Rng) -> dict[str, np.ndarray]:
        kind = draw_kind(sample["seed"], sample["step"], self.weights)  # of this step
        views = crops(sample, self.augments[kind], rng, self.same_crops)
        if self.mask_ratios is None:
            return views
        side, masks = self.sides[kind], []
        for i in range(GLOBAL):
            ratio = stratified_ratio(sample, i, GLOBAL, self.mask_share, self.mask_ratios)
            masks.append(block_mask((side, side), int(ratio * side * side), rng(MASKS + i)).reshape(-1))
        return views | {"mask": np.stack(masks)}

    def collate(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"mask_indices", "mask_weight"} of the masks of a micro-batch, see `masked_patches`; {} without masks. With
        `cells`, there is one pair of entries for each size of cells, "mask_indices_SIZE" and "mask_weight_SIZE"."""
        if self.mask_ratios is None:
            return {}
        if self.cells is None:
            return masked_patches(batch["mask"])
        masks = batch["mask"].reshape(-1, batch["mask"].shape[-1])
        side, out = math.isqrt(masks.shape[1]), dict[str, np.ndarray]()
        for cell in self.cells:
            target = side * self.patch_size // cell
            resized = resize_mask(masks, (side, side), (target, target))
            out |= {f"{key}_{cell}": value for key, value in masked_patches(resized).items()}
        return out


def multicrop(
    cfg: Any,
    image_size: int,
    patch_size: int,
    gram_size: int = 0,
    resolutions: list[list[float]] | None = None,
    local_patch: int | None = None,
    cells: tuple[int, ...] | None = None,
) -> MultiCropViews:
    """The views for global crops of `image_size` pixels and patches of `patch_size`, with Gram crops if `gram_size` is
    above 0.

    `resolutions`: rows of (global, local, Gram pixels, weight) of DINOv3's high-resolution stage; each step uses one
    row, drawn from (seed, step). `local_patch`: local crops must be a multiple of this size; default: `patch_size`.
    `cells`: the sizes in pixels of the cells in which a loss compares masked patches; None: patches of `patch_size`;
    (): no masks, and their options are not read.
    """
    rows = resolutions or [[image_size, cfg.local_size, gram_size, 1.0]]
    _check(rows, patch_size, gram_size > 0, (local_patch or patch_size) if cfg.local_crops else None)
    sizes = [tuple(map(int, row[:3])) for row in rows]
    return MultiCropViews(
        augments=[_augments(cfg, size) for size in sizes],
        sides=[size[0] // patch_size for size in sizes],
        weights=tuple(row[3] for row in rows),
        mask_share=0.0 if cells == () else cfg.mask_share,
        mask_ratios=None if cells == () else (cfg.mask_ratio_min, cfg.mask_ratio_max),
        same_crops={"gram": "global"} if gram_size else {},
        patch_size=patch_size,
        cells=cells,
    )


def unmasked_crops(
    cfg: Any, image_size: int, patch_size: int
) -> Callable[[dict[str, Any], Rng], dict[str, np.ndarray]]:
    """The views {"global": [G, 3, H, W], "local": [L, 3, h, w]} without masks, for DINO, SwAV and LeJEPA.

    `patch_size`: the size that crops have to be a multiple of. Raises ValueError for sizes that are not.
    """
    _check([[image_size, cfg.local_size, 0, 1.0]], patch_size, False, patch_size if cfg.local_crops else None)
    augments = _augments(cfg, (image_size, cfg.local_size, 0))

    def view(sample: dict[str, Any], rng: Rng) -> dict[str, np.ndarray]:
        return crops(sample, augments, rng)

    return view


@functools.lru_cache(64)
def draw_kind(seed: int, step: int, weights: tuple[float, ...]) -> int:
    """Draw the kind of a step, with probabilities in proportion to `weights`.

    It depends on (seed, step) only, and is therefore the same in all processes and after a restart.
    """
    point = hash_to_key(seed, STEP_KIND_KEY, step) / 2**64 * sum(weights)
    return min(int(np.searchsorted(np.cumsum(weights), point, side="right")), len(weights) - 1)


def _check(rows: list[list[float]], patch_size: int, gram: bool, local_patch: int | None) -> None:
    """Raises ValueError for sizes that are not multiples of the patch, or for Gram crops without a Gram teacher.

    `local_patch`: None if there are no local crops.
    """
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
                f"objective.resolutions: {row} must have Gram pixels if there is a gram_teacher, and 0 if there is none"
            )


def _augments(cfg: Any, sizes: Sizes) -> dict[str, list[Augment]]:
    wide, small = (cfg.global_scale, 1.0), (cfg.local_scale, cfg.global_scale)
    common = {"jitter": tuple(cfg.jitter), "gray": 0.2, "flip": cfg.flip}
    first = Augment(sizes[0], wide, blur=cfg.blur[0], **common)
    second = Augment(sizes[0], wide, blur=cfg.blur[1], solarize=cfg.solarize, **common)
    local = Augment(sizes[1], small, blur=cfg.blur[2], **common)
    out = {"global": [first, second], "local": [local] * cfg.local_crops}
    if sizes[2]:
        out["gram"] = [Augment(sizes[2], wide, flip=cfg.flip)] * GLOBAL
    return out
