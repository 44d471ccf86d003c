"""Images to rows of patch pixels and back. Shapes: B images, C channels, N = h·w patches of p×p pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, h·p, w·p] → [B, N, p·p·C]: patches row-major, pixels row-major inside, channels last (MAE's order)."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, p·p·C] → [B, C, h·p, w·p]."""
    b, (h, w) = patches.shape[0], grid
    x = patches.reshape(b, h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch, w * patch)


def complement(keep: Tensor, count: int) -> Tensor:
    """The sorted indices [B, count − K] that are not in keep [B, K]."""
    dropped = torch.ones(len(keep), count, dtype=torch.bool, device=keep.device).scatter(1, keep, False)
    return dropped.nonzero()[:, 1].view(len(keep), count - keep.shape[1])
