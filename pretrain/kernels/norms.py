"""Norms without autocast's copies in fp32 (CUDA), and with a fast backward (CPU)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.layers import LayerNorm
from pretrain.models.text_mlp import RMSNorm
from pretrain.ops.precision import wide


class CudaLayerNorm(LayerNorm):
    """Layer norm in one kernel that reads and writes the dtype of x and sums in fp32. Autocast would copy x to fp32,
    and keep the copy for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class CudaRMSNorm(RMSNorm):
    """RMSNorm in such a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class CpuRMSNorm(RMSNorm):
    """RMSNorm whose backward uses LayerNorm's kernel instead of several operations."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # inductor fuses the plain one
            return super().forward(x)
        exact = wide(x)
        with torch.autocast("cpu", enabled=False):
            weight = self.weight.to(exact.dtype)
            return _RMSNorm.apply(exact.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x [N, D] → x / sqrt(mean(x²) + eps) · weight, in the dtype of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [N, 1]
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        # LayerNorm's kernel with a mean of zero. It subtracts the gradient through the mean, which is added again
        # below.
        mean, width = torch.zeros_like(scale), x.shape[-1:]
        grad = grad.contiguous()
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, width, mean, scale, weight, None, [True, True, False]
        )
        return dx.addcmul_((grad @ weight).unsqueeze(1), scale, value=1 / x.shape[-1]), dw, None
