"""Exponential moving average of a module's weights: the teacher of self-distillation."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from pretrain.ops.parameter_shards import local

M = TypeVar("M", bound=nn.Module)
MAX_TEMPORARY = 1 << 26  # numbers that `move_towards` holds beside its arguments


def make_teacher(student: M) -> M:
    """A frozen copy of the student with the same weights, and no drop path."""
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if hasattr(module, "drop_rate"):  # DropPath, in pretrain/models/layers.py
            module.drop_rate = 0.0
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float, skipped: Tensor | None = None) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, in one pass over all parameters; buffers are copied.

    `skipped` is `Objective.skipped`: where that scalar on the device is 1, the parameters stay as they are.

    If an engine has sharded both, each rank updates its own shards. Raises ValueError where the two are not sharded
    alike.
    """
    ours, theirs = [local(p) for p in teacher.parameters()], [local(p) for p in student.parameters()]
    # an empty local shard is fine (few rows on many ranks); an empty parameter that is not sharded is an unknown
    # engine's placeholder
    placeholder = any(p.numel() == 0 and a is p for p, a in zip(teacher.parameters(), ours, strict=True))
    if placeholder or len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(
            "teacher and student do not have the same parameters, sharded in the same way, so the teacher cannot be updated;"
            " parallel.frozen=replicated is for teachers that never change: write parallel.frozen=sharded"
        )
    if skipped is None:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
    elif ours[0].device.type == "cpu":
        torch._foreach_lerp_(ours, theirs, float((1 - momentum) * (1 - skipped)))
    else:
        move_towards(ours, theirs, (1 - momentum) * (1 - skipped))
    for buffer, source in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(source)


@torch.no_grad()
def move_towards(tensors: list[Tensor], targets: list[Tensor], share: Tensor) -> None:
    """tensor ← tensor + share · (target − tensor), in place; `share` is a scalar on the device, which the host does not
    read.

    `_foreach_lerp_` with a weight on the device launches one kernel per tensor; these three calls launch a few for all
    of them. Where `share` is 0, no bit changes.
    """
    first = held = 0
    for last, tensor in enumerate(tensors, 1):
        held += tensor.numel()
        if held >= MAX_TEMPORARY or last == len(tensors):
            change = torch._foreach_sub(targets[first:last], tensors[first:last])
            torch._foreach_mul_(change, share)
            torch._foreach_add_(tensors[first:last], change)
            first, held = last, 0
