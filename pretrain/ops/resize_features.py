"""Resize one network's patch features to another network's grid, and standardise features. Shapes: B images, N patches
of a grid h × w, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import sum_over_world
from pretrain.ops.precision import wide


def align_map(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Patches [B, h·w, D] of `grid` resized to the grid `target`, [B, h'·w', D]: averages if its cells are larger,
    bilinear interpolation if they are smaller. In fp32 or wider, unless the grids are equal.

    A feature that depends linearly on the position keeps its value at each position (for smaller cells, only away from
    the border).
    """
    if tuple(grid) == tuple(target):
        return tokens
    exact = wide(tokens)
    maps = exact.transpose(1, 2).unflatten(2, tuple(grid))  # [B, D, h, w]
    if all(t <= g for g, t in zip(grid, target, strict=True)):
        maps = F.interpolate(maps, size=tuple(target), mode="area")
    else:
        maps = F.interpolate(maps, size=tuple(target), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # [B, h'·w', D]


@torch.no_grad()
def standardise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Rows [R, D] standardised: each coordinate has mean 0 and variance 1 over the rows of all ranks. In fp32 or
    wider."""
    x = wide(x)
    count = sum_over_world(torch.full((), float(len(x)), dtype=x.dtype, device=x.device))
    mean = sum_over_world(x.sum(0)) / count
    variance = sum_over_world((x - mean).square().sum(0)) / count
    return (x - mean) / (variance + eps).sqrt()
