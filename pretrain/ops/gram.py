"""Gram anchoring: a student's patches keep the similarities to each other that an earlier teacher's had (DINOv3, arXiv 2508.10104 §4).

Shapes: B images, N patches, h·w = N; each network may have its own D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import sum_over_world, world

CHOICES = ("all", "masked", "unmasked")
NEGATIVES = ("keep", "clip", "clip_teacher")


def resize_map(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Patch features [B, N', D] of a grid (h', w') resized bicubically to another: [B, N, D], in fp32 or wider."""
    if tuple(grid) == tuple(target):
        return tokens
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    maps = wide.transpose(1, 2).unflatten(2, grid)  # [B, D, h', w']
    with torch.autocast(tokens.device.type, enabled=False):
        return F.interpolate(maps, size=tuple(target), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    tokens: str = "all",
    negatives: str = "keep",
    per_image: bool = True,
) -> Tensor:
    """Mean over pairs of patches of (s_i·s_j − t_i·t_j)² for L2-normalised student and teacher patches [B, N, D] (eq. 2 / N²), in fp32 or wider.

    `tokens`: the pairs whose both patches are masked (mask bool [B, N]) or unmasked, or all. Each image's mean weighs the same, on whichever process
    it is; an image without such patches counts for nothing. `negatives`: clip puts 0 for similarities below it, on both sides; clip_teacher does so to the teacher, and to the
    student only where the teacher is negative as well. With `per_image` false, patches are also compared across the images of this process.
    """
    s, t = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-8) for x in (student, teacher))
    chosen = torch.ones(s.shape[:2], dtype=torch.bool, device=s.device)
    if tokens != "all":
        if mask is None:
            raise ValueError(f'tokens = "{tokens}" needs a mask')
        chosen = mask if tokens == "masked" else ~mask
    if not per_image:
        s, t, chosen = (x.flatten(0, 1).unsqueeze(0) for x in (s, t, chosen))
    with torch.autocast(s.device.type, enabled=False):
        ours, theirs = s @ s.transpose(1, 2), t @ t.transpose(1, 2)  # [B, N, N]
    if negatives == "clip":
        ours, theirs = ours.clamp(min=0), theirs.clamp(min=0)
    elif negatives == "clip_teacher":
        ours, theirs = torch.where(theirs < 0, ours.clamp(min=0), ours), theirs.clamp(min=0)
    error = (ours - theirs).square()
    if tokens == "all":
        return error.mean()
    pairs = (chosen.unsqueeze(1) & chosen.unsqueeze(2)).to(error.dtype)
    count = pairs.sum((1, 2))
    means = (error * pairs).sum((1, 2)) / count.clamp(min=1)  # [B]
    images = (
        sum_over_world((count > 0).sum()).clamp(min=1) / world()[1]
    )  # that have any, on all processes: the mean over these is that of all
    return means.sum() / images
