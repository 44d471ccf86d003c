"""Convert images to patches and clips to cubes, and back, and pick them by their indices.

Shapes: B images or clips, C channels, N = h·w patches of p×p pixels, K patches that are kept, M others, D features.
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


def tubelets(clips: Tensor, frames: int, patch: int) -> Tensor:
    """[B, t·f, C, h·p, w·p] → [B, t·h·w, f·p·p·C], the cubes of f frames and p×p pixels. Cubes are in the order of
    time, row, column, and so are the pixels of a cube; channels come last (the order of VideoMAE)."""
    b, total, c, height, width = clips.shape
    x = clips.reshape(b, total // frames, frames, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(b, -1, frames * patch * patch * c)


def untubelets(cubes: Tensor, frames: int, patch: int, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `tubelets`: [B, t·h·w, f·p·p·C] → [B, t·f, C, h·p, w·p]."""
    b, (t, h, w) = cubes.shape[0], grid
    x = cubes.reshape(b, t, h, w, frames, patch, patch, -1)
    return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(b, t * frames, -1, h * patch, w * patch)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [B, N, p·p·C] → [B, C, h·p, w·p]."""
    b, (h, w) = patches.shape[0], grid
    x = patches.reshape(b, h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch, w * patch)


def complement(keep: Tensor, count: int) -> Tensor:
    """The indices from 0 to `count` − 1 that are not in the same row of keep [B, K], sorted: [B, count − K]."""
    kept = mask_at(keep, count).to(torch.uint8)
    return kept.argsort(dim=1, stable=True)[:, : count - keep.shape[1]]  # nonzero would need a host sync


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The rows [B, M, D] of x [B, N, D] at `index` [B, M]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def mask_at(index: Tensor, count: int) -> Tensor:
    """bool [B, count], true at the indices in the same row of `index` [B, M]."""
    return torch.zeros(len(index), count, dtype=torch.bool, device=index.device).scatter(1, index, True)
