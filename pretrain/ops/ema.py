"""Exponential moving average of a module's weights: the teacher of self-distillation."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from pretrain.ops.parameter_shards import local
from pretrain.ops.sync_norm import BatchNorm

M = TypeVar("M", bound=nn.Module)
MAX_TEMPORARY = 1 << 26  # about the largest number of elements of the temporary tensors of `move_towards`


def make_teacher(student: M, batch_statistics: bool = False) -> M:
    """A frozen copy of the student with the same weights, and no drop path.

    `batch_statistics`: batch norms of the teacher normalise by the teacher's own batch, also in evaluation mode, and
    keep running statistics of their own.
    """
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if hasattr(module, "drop_rate"):  # DropPath, in pretrain/models/layers.py
            module.drop_rate = 0.0
        if isinstance(module, BatchNorm):
            module.batch_statistics = batch_statistics
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float, skipped: Tensor | None = None) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, in one pass over all parameters; buffers are copied,
    but not those of batch norms with statistics of their own.

    `skipped` is `Objective.skipped`, a scalar on the device: if it is 1, the parameters do not change.

    If both are sharded, each rank updates its shards. Raises ValueError if they are not sharded in the same way.
    """
    ours, theirs = [local(p) for p in teacher.parameters()], [local(p) for p in student.parameters()]
    # A local shard may be empty (few rows on many ranks). A parameter that is empty but not sharded is the placeholder
    # of an engine that `local` does not know.
    placeholder = any(p.numel() == 0 and a is p for p, a in zip(teacher.parameters(), ours, strict=True))
    if placeholder or len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(
            "teacher and student do not have the same parameters, sharded in the same way, so the teacher cannot be"
            " updated; parallel.frozen=replicated is for teachers that never change: write parallel.frozen=sharded"
        )
    if not ours:  # nothing but buffers
        pass
    elif skipped is None:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
    elif ours[0].device.type == "cpu":
        torch._foreach_lerp_(ours, theirs, float((1 - momentum) * (1 - skipped)))
    else:
        move_towards(ours, theirs, (1 - momentum) * (1 - skipped))
    for module, other in zip(teacher.modules(), student.modules(), strict=True):
        if not getattr(module, "batch_statistics", False):
            for buffer, source in zip(module.buffers(recurse=False), other.buffers(recurse=False), strict=True):
                buffer.copy_(source)


@torch.no_grad()
def move_towards(tensors: list[Tensor], targets: list[Tensor], share: Tensor) -> None:
    """tensor ← tensor + share · (target − tensor), in place; `share` is a scalar on the device, which the host does not
    read.

    `_foreach_lerp_` with a weight on the device launches one kernel per tensor; these three calls launch a few kernels
    for all tensors. If `share` is 0, no bit changes.
    """
    first = held = 0
    for last, tensor in enumerate(tensors, 1):
        held += tensor.numel()
        if held >= MAX_TEMPORARY or last == len(tensors):
            change = torch._foreach_sub(targets[first:last], tensors[first:last])
            torch._foreach_mul_(change, share)
            torch._foreach_add_(tensors[first:last], change)
            first, held = last, 0
