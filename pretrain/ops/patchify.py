"""Convert images to patches and back, and find the patches that are not kept.

Shapes: B images, C channels, N = h·w patches of p×p pixels, K patches that are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, h·p, w·p] → [B, N, p·p·C]. Patches are in row-major order, and so are the pixels of a patch; channels come
    last (the order of MAE)."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, p·p·C] → [B, C, h·p, w·p]."""
    b, (h, w) = patches.shape[0], grid
    x = patches.reshape(b, h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch, w * patch)


def complement(keep: Tensor, count: int) -> Tensor:
    """The indices from 0 to `count` − 1 that are not in the same row of keep [B, K], sorted: [B, count − K]."""
    kept = torch.zeros(len(keep), count, dtype=torch.uint8, device=keep.device).scatter(1, keep, 1)
    return kept.argsort(dim=1, stable=True)[:, : count - keep.shape[1]]  # nonzero would need a host sync
