"""Batch normalisation over the samples of all ranks (arXiv 1502.03167), in fp32 and on any device. torch's
SyncBatchNorm works on GPUs only."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.ops.gather import all_reduce, world
from pretrain.ops.precision import wide


class BatchNorm(_BatchNorm):
    """nn.BatchNorm1d and nn.BatchNorm2d in one class, with the same parameters and buffers, but with mean and variance
    of the global batch. x [B, C, ...] → [B, C, ...]. With `affine=False` it has no weight and no bias."""

    momentum: float  # the share of a batch in the running statistics
    # True in a teacher that normalises by its own batch, as published for BYOL, MoCo and DINO: the module stays in
    # training mode where the network around it is set to evaluation mode (`pretrain.ops.ema.make_teacher`).
    batch_statistics = False

    def train(self, mode: bool = True) -> Self:
        return super().train(mode or self.batch_statistics)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm takes [B, C, ...], not {list(input.shape)}; add the missing dimension")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training:
            self.num_batches_tracked.add_(1)
        with torch.autocast(x.device.type, enabled=False):
            # PyTorch's operation refuses a single value for each channel, such as that of one masked patch.
            is_single = x.numel() == x.shape[1]
            if not self.training or (world()[1] == 1 and not is_single):
                return self._in_one_process(x)
            return self._over_processes(wide(x)).to(x.dtype)

    def _in_one_process(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        # FSDP2 gathers weights in the compute dtype, but PyTorch's operation needs all four tensors in the same dtype.
        weight, bias = (None if value is None else value.to(mean.dtype) for value in (self.weight, self.bias))
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)

    def _over_processes(self, x: Tensor) -> Tensor:
        reduced_dims = [0, *range(2, x.ndim)]  # all but the channels
        count = torch.full((1,), float(x.numel() // x.shape[1]), dtype=x.dtype, device=x.device)
        totals = all_reduce(torch.cat([x.sum(reduced_dims), count]))  # [C + 1]
        n = totals[-1].detach().clamp_min(1)  # no sample on any rank: such as masked patches where no crop is masked
        momentum = self.momentum * (totals[-1].detach() > 0).to(self.running_mean.dtype)  # 0 without any sample
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = totals[:-1] / n  # [C]
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(reduced_dims)) / n  # [C]
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            unbiased = (variance * (n / (n - 1).clamp_min(1))).to(self.running_var.dtype)
            self.running_var.lerp_(unbiased, momentum.to(self.running_var.dtype))
        scale = (variance + self.eps).rsqrt()
        if self.weight is None:
            return centred * scale.view(shape)
        return centred * (scale * self.weight.to(x.dtype)).view(shape) + self.bias.to(x.dtype).view(shape)
