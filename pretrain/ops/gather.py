"""Collectives for losses. Without a process group, each of them is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Versions of torch before 2.14 have only the names on the right.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = x.new_empty(world()[1] * x.shape[0], *x.shape[1:])
        all_gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # a new tensor, because autograd may pass `grad` to other nodes of the graph as well
        out = grad.new_empty(len(grad) // world()[1], *grad.shape[1:])
        _reduce_scatter(out, grad.contiguous())
        return out


def gather(x: Tensor) -> Tensor:
    """All-gather x [B, ...] along dim 0 in rank order: [W·B, ...]. The gradient of x is the sum over all ranks of the
    gradients of its rows."""
    return _Gather.apply(x) if world()[1] > 1 else x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all ranks, with a gradient: that of this rank's x is the sum of all ranks' gradients.

    Where every rank computes the loss of the global batch from such sums, the mean of the ranks' gradients, which an
    engine takes, is the gradient of that loss.
    """
    return _Sum.apply(x) if world()[1] > 1 else x


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        products = a.T @ b
        dist.all_reduce(products)
        return products

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return (b @ grad.T).mul_(world()[1]), (a @ grad).mul_(world()[1])


def products_over_batch(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b over the rows of all ranks, [P, Q], from this rank's rows a [B, P] and b [B, Q], for a loss that every rank
    computes from this matrix in the same way.

    The gradient with respect to the matrix is then equal on all ranks, so that the backward multiplies it by their
    number instead of all-reducing it: no copy of the matrix is made, which has 256 MB for P = Q = 8,192.
    """
    return _Products.apply(a, b) if world()[1] > 1 else a.T @ b


@torch.no_grad()
def logsumexp_over_batch(x: Tensor) -> Tensor:
    """log Σ exp over dim 0 of x [B, K] and over all ranks: [1, K], without overflow. B may differ between ranks, and
    may be 0."""
    highest = x.amax(0, keepdim=True) if len(x) else x.new_full((1, x.shape[1]), -torch.inf)
    if world()[1] > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (x - highest).exp().sum(0, keepdim=True)
    if world()[1] > 1:
        dist.all_reduce(total)
    return highest + total.log()


@torch.no_grad()
def sum_over_world(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; `x` is not changed."""
    if world()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x
