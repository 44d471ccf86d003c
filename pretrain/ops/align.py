"""One network's patches against another's, where their grids differ. Shapes: B images, N patches of a grid h × w, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import sum_over_world


def align_map(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Patches [B, h·w, D] at another grid's cells [B, h'·w', D]: the mean of what a cell covers, or bilinear where cells are smaller.

    A feature that is linear in the place keeps its value at each place (away from the border where cells are smaller). At least fp32.
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


def align_mask(mask: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """A mask bool [B, h·w] at another grid: a cell is set where the cell under its centre is."""
    if tuple(grid) == tuple(target):
        return mask
    maps = mask.unflatten(1, tuple(grid))  # [B, h, w]
    for axis, (held, wanted) in enumerate(zip(grid, target, strict=True)):
        under = (2 * torch.arange(wanted, device=mask.device) + 1) * held // (2 * wanted)
        maps = maps.index_select(axis + 1, under)
    return maps.flatten(1)


@torch.no_grad()
def standardise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Rows [R, D] with mean 0 and variance 1 of each coordinate over the rows of all processes, in fp32 or wider."""
    x = x if x.dtype == torch.float64 else x.float()
    count = sum_over_world(torch.tensor(float(len(x)), dtype=x.dtype, device=x.device))
    mean = sum_over_world(x.sum(0)) / count
    variance = sum_over_world((x - mean).square().sum(0)) / count
    return (x - mean) / (variance + eps).sqrt()
