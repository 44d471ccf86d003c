"""Gradient reversal (arXiv 1409.7495): two networks with opposite aims are trained by one backward."""

from __future__ import annotations

import torch
from torch import Tensor


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return -ctx.scale * grad, None


def reverse_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself; its gradient is multiplied by −scale."""
    return _Reverse.apply(x, scale)
