"""Pictures of what an objective does with images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.ops.patchify import patchify, unpatchify


def side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """uint8 [3, B·H, n·W] from n batches of images [B, C, H, W]: a row for each image. The contrast of a row is set by
    the range of its first image. Of more than three channels the first three are shown, of fewer the first one."""
    rows = torch.stack([column.to(columns[0].dtype) for column in columns], dim=1)  # [B, n, C, H, W]
    low, high = (edge(rows[:, :1], (1, 2, 3, 4), keepdim=True) for edge in (torch.amin, torch.amax))
    rows = rows[:, :, :3] if rows.shape[2] >= 3 else rows[:, :, :1].expand(-1, -1, 3, -1, -1)
    rows = ((rows - low) / (high - low)).clamp(0, 1) * 255
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).byte()


def reconstructions(images: Tensor, index: Tensor, patches: Tensor, patch: int) -> Tensor:
    """uint8 [3, B·H, 3·W], a row for each image [C, H, W]: the image, the image without its patches at `index` [B, M],
    and the image with `patches` [B, M, p·p·C] there, where p is `patch`."""
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    pixels = patchify(images, patch)
    index = index.unsqueeze(-1).expand(-1, -1, pixels.shape[-1])
    seen, painted = (
        pixels.scatter(1, index, fill) for fill in (pixels.new_zeros(index.shape), patches.to(pixels.dtype))
    )
    return side_by_side([unpatchify(x, patch, grid) for x in (pixels, seen, painted)])
