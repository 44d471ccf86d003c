"""Batch normalisation over the samples of all processes (arXiv 1502.03167), in fp32 and on any device; torch's SyncBatchNorm is for GPUs only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.ops.gather import world


class _Sum(torch.autograd.Function):
    """The sum over processes; the gradient is the sum of all processes' gradients."""

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


class BatchNorm(_BatchNorm):
    """nn.BatchNorm1d and 2d in one, with the same parameters and buffers: x [B, C, ...]; mean and variance are those of the global batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm takes [B, C, ...], not {list(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if world()[1] == 1 or not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._over_processes(x if x.dtype == torch.float64 else x.float()).to(x.dtype)

    def _over_processes(self, x: Tensor) -> Tensor:
        others = [0, *range(2, x.ndim)]
        count = torch.tensor([float(x.numel() // x.shape[1])], dtype=x.dtype, device=x.device)
        totals = _Sum.apply(torch.cat([x.sum(others), count]))
        n = totals[-1].detach()
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = totals[:-1] / n  # [C]
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(others)) / n
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance * (n / (n - 1))).to(self.running_var.dtype), share)
        scale = (variance + self.eps).rsqrt() * self.weight.to(x.dtype)
        return centred * scale.view(shape) + self.bias.to(x.dtype).view(shape)
