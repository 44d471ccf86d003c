"""Exponential moving average of a module's weights: the teacher of self-distillation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pretrain.models.layers import DropPath


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy of the student with the same weights, and no drop path."""
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float, skipped: Tensor | None = None) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, one pass over all parameters; buffers are copied.

    `skipped` is `Objective.skipped`: where that scalar on the device is 1, the teacher stays as it is.

    Raises ValueError where the two do not line up or a parameter is an empty placeholder (a sharded engine has to update its own shards).
    """
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    if len(ours) != len(theirs) or any(a.shape != b.shape or a.numel() == 0 for a, b in zip(ours, theirs, strict=True)):
        raise ValueError("teacher and student do not have the same non-empty parameters, so the teacher cannot follow")
    if skipped is None:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
    else:
        torch._foreach_lerp_(ours, theirs, [(1 - momentum) * (1 - skipped)] * len(ours))  # type: ignore[list-item]
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(source)
