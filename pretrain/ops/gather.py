"""Collectives that losses need. Each is the identity where no process group is initialised."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.14


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.new_empty(world()[1] * x.shape[0], *x.shape[1:])
        all_gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world()[1])[world()[0]]


def gather(x: Tensor) -> Tensor:
    """Concatenate x [B, ...] of all processes in rank order: [W·B, ...]. The gradient is the sum of all processes' gradients for own rows."""
    return _Gather.apply(x) if world()[1] > 1 else x


@torch.no_grad()
def logsumexp_over_batch(x: Tensor) -> Tensor:
    """log Σ exp over dim 0 of x [B, K] and over all processes: [1, K], without overflow. B may differ between processes, also be 0."""
    highest = x.amax(0, keepdim=True) if len(x) else x.new_full((1, x.shape[1]), -torch.inf)
    if world()[1] > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (x - highest).exp().sum(0, keepdim=True)
    if world()[1] > 1:
        dist.all_reduce(total)
    return highest + total.log()


@torch.no_grad()
def sum_over_world(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x
