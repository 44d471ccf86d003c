"""Position embeddings of a grid of patches: fixed sin-cos tables (MAE; VideoMAE and V-JEPA for clips), interpolation of
a table, and axial rotary angles (DINOv3; V-JEPA 2 for clips)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TABLES = 32  # more than the grids of a run; one of a large grid takes a megabyte


class Tables(dict[Any, Any]):
    """Tables of positions on a device, each made once for its key. Of more than MAX_TABLES the oldest is left out, as
    an encoder may be given images of any size."""

    def of(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            if len(self) >= MAX_TABLES:
                del self[next(iter(self))]
            with torch.inference_mode(False):  # training may need it later
                self[key] = make()
        return self[key]


def sincos_table(dim: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Fixed 2-D sin-cos positions [h·w, dim] in the order of MAE (arXiv 2111.06377): the first half encodes the column,
    the second half the row."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, not {dim}")
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * rate for axis in (columns, rows)]
    return torch.cat([f for angle in angles for f in (angle.sin(), angle.cos())], dim=1).float()


def sequence_table(dim: int, count: int, device: torch.device | None = None) -> Tensor:
    """Sin-cos positions [count, dim] of the numbers 0, 1, 2, … (arXiv 1706.03762): feature 2k is sin(n / 10000^(2k /
    dim)), and feature 2k + 1 the cosine of the same angle."""
    if dim % 2:
        raise ValueError(f"sin-cos positions need an even width, not {dim}")
    rate = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim / 2))
    angles = torch.arange(count, dtype=torch.float64, device=device).unsqueeze(1) * rate
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def clip_table(dim: int, grid: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
    """Fixed 3-D sin-cos positions [t·h·w, dim] of V-JEPA (arXiv 2404.08471): a third of the features, rounded up to an
    even number, encodes the time, one the row and one the column; the last features are cut off."""
    width = 2 * math.ceil(dim / 6)
    rate = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=device) / (width / 2))
    angles = [axis * rate for axis in _coordinates(grid, device)]
    return torch.cat([f for angle in angles for f in (angle.sin(), angle.cos())], dim=1)[:, :dim].float()


def clip_rotation(
    head_dim: int, grid: tuple[int, int, int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles of V-JEPA 2's rotary positions (arXiv 2506.09985), each fp32 [t·h·w, 1, head_dim].

    Three equal parts of a head are rotated by time, row and column; what is left is not rotated. Feature j of a part of
    width w has the angle coordinate / 10000^(2(j mod w/2) / w). As in the published code, whose weights need it, the
    pairs that `AdjacentRotary` combines are (2i, 2i + 1), although both features of such a pair have different angles.
    """
    width = 2 * (head_dim // 3 // 2)
    if head_dim % 2 or not width:
        raise ValueError(f"rotary positions of clips need a head width that is even and 6 or more, not {head_dim}")
    rate = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=device) / (width / 2))
    angles = [axis * rate.repeat(2) for axis in _coordinates(grid, device)]  # each [N, w]
    rest = angles[0].new_zeros(len(angles[0]), head_dim - 3 * width)
    whole = torch.cat([*angles, rest], dim=1).unsqueeze(1)
    return whole.cos().float(), whole.sin().float()


def _coordinates(grid: tuple[int, int, int], device: torch.device | None) -> list[Tensor]:
    """The time, the row and the column of each token of a clip, each float64 [t·h·w, 1]."""
    axes = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)
    return [axis.reshape(-1, 1) for axis in torch.meshgrid(*axes, indexing="ij")]


def interpolate_table(table: Tensor, grid: tuple[int, int], antialias: bool, offset: float = 0.0) -> Tensor:
    """A square position table [1, N, D] resized to another grid by bicubic interpolation: [1, h·w, D].

    `offset`: if it is not 0, the distance of two sampled points is not side / h, but side / (h + offset), and so for w,
    as in DINOv2's code, which has an offset of 0.1 in its models without registers.
    """
    side = math.isqrt(table.shape[1])
    if (side, side) == tuple(grid):
        return table
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    target: dict[str, Any] = {"size": tuple(grid)}
    if offset:
        target = {"scale_factor": tuple((n + offset) / side for n in grid)}
    resized = F.interpolate(square, **target, mode="bicubic", antialias=antialias, align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


def resize_table(table: Tensor, side: int, antialias: bool, offset: float = 0.0) -> Tensor:
    """A position table [1, 1 + N, D], whose first entry is that of the class token, or [1, N, D] without one, resized to
    side² patches; N is a square."""
    first = table.shape[1] - math.isqrt(table.shape[1]) ** 2  # 1 with a class token, else 0
    return torch.cat([table[:, :first], interpolate_table(table[:, first:], (side, side), antialias, offset)], dim=1)


def rope_periods(head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """base^(2k / (head_dim / 2)) for k < head_dim / 4, fp32 (arXiv 2508.10104)."""
    if head_dim % 4:
        raise ValueError(f"axial rope needs a head width that is a multiple of 4, not {head_dim}")
    return base ** (2 * torch.arange(head_dim // 4, dtype=torch.float32, device=device) / (head_dim / 2))


def rope_angles(periods: Tensor, grid: tuple[int, int], change: Tensor | None = None) -> Tensor:
    """Angles [h·w, head_dim] of the patch centres, whose coordinates are in [-1, 1] on each axis: 2π·coordinate /
    period, first for the row and then for the column, and both repeated.

    `change` [L, 2, 2] on the same device, from `rope_change`, changes the coordinates; the result is then
    [L, h·w, head_dim].
    """
    axes = [(torch.arange(n, dtype=torch.float32, device=periods.device) + 0.5) / n * 2 - 1 for n in grid]
    rows, columns = (axis.reshape(-1, 1) for axis in torch.meshgrid(*axes, indexing="ij"))  # each [h·w, 1]
    if change is not None:
        scale, shift = change.unsqueeze(-1).unsqueeze(-1).unbind(1)  # each [L, 2, 1, 1]
        rows, columns = ((axis + shift[:, i]) * scale[:, i] for i, axis in enumerate((rows, columns)))  # [L, h·w, 1]
    angles = [2 * math.pi * axis / periods for axis in (rows, columns)]  # each [..., h·w, head_dim/4]
    return torch.cat([*angles, *angles], dim=-1)


def rope_change(count: int, shift: float | None, jitter: float | None, rescale: float | None) -> Tensor:
    """`count` random (scale, shift) of rows and columns, [count, 2, 2] on CPU from torch's global generator: RoPE box
    jittering (arXiv 2508.10104 §3.2).

    Coordinates are shifted by up to ±shift on each axis, then each axis is scaled by a log-uniform factor in [1/jitter,
    jitter], then both by the same one in [1/rescale, rescale]. None leaves an operation out. All numbers are drawn
    whatever is left out.
    """
    u = 2 * torch.rand(count, 5) - 1  # in [-1, 1)
    scale = torch.ones(count, 2)
    if jitter is not None:
        scale = scale * (u[:, 2:4] * math.log(jitter)).exp()
    if rescale is not None:
        scale = scale * (u[:, 4:] * math.log(rescale)).exp()
    return torch.stack([scale, u[:, :2] * (shift or 0.0)], dim=1)
