"""Batch norm over the samples of all ranks with the kernels of nn.SyncBatchNorm: one pass over x for its statistics and
one for the output, and two for backward; the plain module takes about eight in fp32.

nn.SyncBatchNorm itself waits for the device three times per layer, to leave out ranks with empty inputs. Ranks have
equal micro-batches here, so nothing is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.ops.gather import all_gather, world
from pretrain.ops.sync_norm import BatchNorm


class CudaBatchNorm(BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if world()[1] == 1 or not self.training or self.weight is None:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            return _Normalized.apply(x, weight, bias, self.running_mean, self.running_var, self.eps, self.momentum)


class _Normalized(torch.autograd.Function):
    """x [B, C, ...], weight and bias [C] in fp32 → the dtype of x. Changes the running statistics [C]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
    ) -> Tensor:
        x = _dense(x)
        mean, scale = torch.batch_norm_stats(x, eps)  # [C]; scale is 1 / sqrt(variance + eps)
        count = torch.full((1,), float(x.numel() // x.shape[1]), dtype=mean.dtype, device=x.device)
        own = torch.cat([mean, scale, count])
        everyone = own.new_empty(world()[1] * len(own))
        all_gather(everyone, own)
        means, scales, counts = everyone.view(-1, len(own)).split(
            [len(mean), len(mean), 1], 1
        )  # [W, C], [W, C], [W, 1]
        means, scales, counts = means.contiguous(), scales.contiguous(), counts.flatten()
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x, means, scales, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, scale, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, scale, counts = ctx.saved_tensors
        grad = _dense(grad)
        sum_dy, sum_dy_xmu, for_weight, for_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, scale, weight, True, True, True
        )
        sums = torch.cat([sum_dy, sum_dy_xmu])
        dist.all_reduce(sums)
        sum_dy, sum_dy_xmu = sums.chunk(2)
        for_x = torch.batch_norm_backward_elemt(grad, x, mean, scale, weight, sum_dy, sum_dy_xmu, counts)
        return for_x, for_weight, for_bias, None, None, None, None  # an engine averages those of weight and bias


# ---------------------------------------------------------------- for fake tensors
_shapes = torch.library.Library("aten", "IMPL", "Meta")  # of the results; PyTorch lacks them for these operations


def _channels(x: Tensor, count: int) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[1], dtype=dtype) for _ in range(count))


_shapes.impl("batch_norm_stats", lambda x, eps: _channels(x, 2))
_shapes.impl("batch_norm_gather_stats_with_counts", lambda x, *_: _channels(x, 2))
_shapes.impl("batch_norm_elemt", lambda x, *_: torch.empty_like(x))
_shapes.impl("batch_norm_backward_reduce", lambda grad, x, *_: _channels(x, 4))
_shapes.impl("batch_norm_backward_elemt", lambda grad, x, *_: torch.empty_like(x))


def _dense(x: Tensor) -> Tensor:
    """The tensor in a memory layout that the kernels accept: channels last, or contiguous."""
    return x if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
