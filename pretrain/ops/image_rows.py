"""Pictures of what an objective does with images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """uint8 [3, B·H, n·W] from n batches of images [B, C, H, W]: a row for each image. The contrast of a row is set by
    the range of its first image. Of more than three channels the first three are shown, of fewer the first one."""
    rows = torch.stack([column.to(columns[0].dtype) for column in columns], dim=1)  # [B, n, C, H, W]
    low, high = (edge(rows[:, :1], (1, 2, 3, 4), keepdim=True) for edge in (torch.amin, torch.amax))
    rows = rows[:, :, :3] if rows.shape[2] >= 3 else rows[:, :, :1].expand(-1, -1, 3, -1, -1)
    rows = ((rows - low) / (high - low)).clamp(0, 1) * 255
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).byte()
