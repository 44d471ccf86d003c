"""Linear layers, norms and MLPs of the text models, in forms that a CPU is fast at.

Shapes: N tokens, D features, F the MLP's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops.products import linear, on_cpu


class _RMSNorm(torch.autograd.Function):
    """x [N, D] → x / sqrt(mean(x²) + eps) · weight, in x's type. On a CPU a seventh of the time of F.rms_norm with its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [N, 1]
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        # LayerNorm's kernel told that the mean is zero: what it takes off for the mean's own gradient is added again
        mean, width = torch.zeros_like(scale), x.shape[-1:]
        grad = grad.contiguous()
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, width, mean, scale, weight, None, [True, True, False]
        )
        return dx.addcmul_((grad @ weight).unsqueeze(1), scale, value=1 / x.shape[-1]), dw, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467), in fp32 or wider, as LLaMA, Qwen3 and T5 have it."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        weight = self.weight.to(wide.dtype)
        if on_cpu(x) and not torch.compiler.is_compiling():
            with torch.autocast("cpu", enabled=False):
                return _RMSNorm.apply(wide.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape).to(x.dtype)
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)


def norm(kind: str, dim: int, eps: float) -> nn.Module:
    return RMSNorm(dim, eps) if kind == "rms" else nn.LayerNorm(dim, eps)


class Linear(nn.Linear):
    """nn.Linear, by the faster kernel where a CPU is slow in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Fused(Linear):
    """Several linear layers of one input as one; `parts` are the rows of each, for what treats them one by one (Muon, other libraries' layouts)."""

    def __init__(self, dim: int, parts: tuple[int, ...], bias: bool):
        super().__init__(dim, sum(parts), bias=bias)
        self.parts = parts


ROWS = 128  # of tokens that a CPU works on at a time, so that they stay in its cache


class _SwiGLU(torch.autograd.Function):
    """[N, 2·F], gate and up side by side → silu(gate) · up [N, F]. Only the input is kept, and backward writes one tensor."""

    @staticmethod
    def forward(ctx, x: Tensor):
        ctx.save_for_backward(x)
        out = x.new_empty(len(x), x.shape[1] // 2)
        for rows, part in zip(x.split(ROWS), out.split(ROWS), strict=True):
            gate, up = rows.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=part)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        for rows, above, below in zip(x.split(ROWS), grad.split(ROWS), out.split(ROWS), strict=True):
            (gate, up), (to_gate, to_up) = rows.chunk(2, dim=-1), below.chunk(2, dim=-1)
            torch.mul(F.silu(gate), above, out=to_up)
            torch.ops.aten.silu_backward.grad_input(above * up, gate, grad_input=to_gate)
        return out


class Mlp(nn.Module):
    """down(act(up x)); swiglu (arXiv 2002.05202) and geglu: down(act(gate x) · up x), with gate and up in one product."""

    def __init__(self, dim: int, width: int, kind: str, bias: bool):
        super().__init__()
        self.kind = kind
        gated = kind in ("swiglu", "geglu")
        self.up = Fused(dim, (width, width), bias) if gated else Linear(dim, width, bias)
        self.down = Linear(width, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu" and on_cpu(x) and not torch.compiler.is_compiling():
            return self.down(_SwiGLU.apply(x))
        if self.kind in ("swiglu", "geglu"):
            gate, up = x.chunk(2, dim=-1)
            return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up)
        if self.kind == "relu2":
            return self.down(F.relu(x).square())
        if self.kind == "relu":
            return self.down(F.relu(x))
        return self.down(F.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none"))
