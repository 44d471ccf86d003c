"""Gram anchoring: the similarities among a student's patches stay near those of an earlier teacher (DINOv3, arXiv
2508.10104 §4).

Shapes: B images, N patches, h·w = N; student and teacher may have different D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import sum_over_world, world
from pretrain.ops.precision import wide

CHOICES = ("all", "masked", "unmasked")
NEGATIVES = ("keep", "clip", "clip_teacher")


def resize_map(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Patch features [B, N', D] of `grid` (h', w') resized to the grid `target` by bicubic interpolation: [B, N, D], in
    fp32 or wider."""
    if tuple(grid) == tuple(target):
        return tokens
    exact = wide(tokens)
    maps = exact.transpose(1, 2).unflatten(2, grid)  # [B, D, h', w']
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
    """The mean of (S_ij − T_ij)² over pairs of patches i, j, in fp32 or wider (eq. 2 divided by N²).

    S_ij = s_i·s_j and T_ij = t_i·t_j for L2-normalised student and teacher patches [B, N, D].

    tokens      all            all pairs
                masked         pairs whose patches are both masked (mask bool [B, N])
                unmasked       pairs whose patches are both not masked
    negatives   keep           S and T as they are
                clip           max(S, 0) and max(T, 0)
                clip_teacher   max(T, 0); max(S, 0) where T < 0, else S
    per_image   true           pairs within an image; mean over those images of all ranks that have such pairs
                false          pairs across all images of this rank
    """
    s, t = (F.normalize(wide(x), dim=-1, eps=1e-8) for x in (student, teacher))
    chosen = torch.ones(s.shape[:2], dtype=torch.bool, device=s.device)  # [B, N]
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
    pairs = (chosen.unsqueeze(1) & chosen.unsqueeze(2)).to(error.dtype)  # [B, N, N]
    count = pairs.sum((1, 2))  # [B]
    means = (error * pairs).sum((1, 2)) / count.clamp(min=1)  # [B]
    # Dividing by the mean number of such images per rank makes the mean over ranks the mean over these images.
    images_per_rank = sum_over_world((count > 0).sum()).clamp(min=1) / world()[1]
    return means.sum() / images_per_rank
