"""Bring one network's patch features to another network's grid. Shapes: B images, N patches of a grid h × w, D
features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import sum_over_world


def align_map(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Patches [B, h·w, D] resized to another grid [B, h'·w', D]: averages over larger cells, bilinear interpolation for
    smaller ones.

    A feature that is linear in the position keeps its value at each position (for smaller cells: away from the border).
    In fp32 or wider, unless the grids are equal.
    """
    if tuple(grid) == tuple(target):
        return tokens
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    maps = wide.transpose(1, 2).unflatten(2, tuple(grid))  # [B, D, h, w]
    if all(t <= g for g, t in zip(grid, target, strict=True)):
        maps = F.interpolate(maps, size=tuple(target), mode="area")
    else:
        maps = F.interpolate(maps, size=tuple(target), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


@torch.no_grad()
def standardise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Rows [R, D] standardised: each coordinate has mean 0 and variance 1 over the rows of all ranks. In fp32 or
    wider."""
    x = x if x.dtype == torch.float64 else x.float()
    count = sum_over_world(torch.full((), float(len(x)), dtype=x.dtype, device=x.device))
    mean = sum_over_world(x.sum(0)) / count
    variance = sum_over_world((x - mean).square().sum(0)) / count
    return (x - mean) / (variance + eps).sqrt()
