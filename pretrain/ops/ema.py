"""Exponential moving average of a module's weights: the teacher of self-distillation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pretrain.models.layers import DropPath
from pretrain.parallel.shards import local


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

    Where an engine has cut both into pieces, each process moves its own. Raises ValueError where the two are not cut alike.
    """
    ours, theirs = [local(p) for p in teacher.parameters()], [local(p) for p in student.parameters()]
    # an empty tensor may be a process's share of few rows, or the placeholder of something that this function does not know
    placeholder = any(p.numel() == 0 and a is p for p, a in zip(teacher.parameters(), ours, strict=True))
    if placeholder or len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(
            "teacher and student do not have the same parameters, cut in the same way, so the teacher cannot follow;"
            " parallel.frozen=replicated is for teachers that stay as they are"
        )
    if skipped is None:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
    else:
        torch._foreach_lerp_(ours, theirs, [(1 - momentum) * (1 - skipped)] * len(ours))  # type: ignore[list-item]
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(source)
