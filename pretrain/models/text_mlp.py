"""Normalisation layers and MLPs of the text models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import LayerNorm, gelu
from pretrain.ops.precision import wide


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467). As in LLaMA, Qwen3 and T5, it is
    computed in fp32 (fp64 for fp64 inputs) and returned in the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        exact = wide(x)
        return F.rms_norm(exact, self.weight.shape, self.weight.to(exact.dtype), self.eps).to(x.dtype)


def norm(kind: str, dim: int, eps: float) -> nn.Module:
    """An RMSNorm if `kind` is "rms", otherwise a LayerNorm."""
    return RMSNorm(dim, eps) if kind == "rms" else LayerNorm(dim, eps)


class FusedLinear(nn.Linear):
    """Several linear layers with the same input, fused into one matrix product. `parts`: the number of outputs of each.
    Muon and the layouts of other libraries use it to treat them as separate layers."""

    def __init__(self, dim: int, parts: tuple[int, ...], bias: bool):
        super().__init__(dim, sum(parts), bias=bias)
        self.parts = parts


class Mlp(nn.Module):
    """down(act(up x)); for swiglu and geglu (arXiv 2002.05202): down(act(gate x) · up x), where one matrix product
    computes both gate x and up x. `width`: the hidden width; `kind`: swiglu, geglu, relu2, relu, gelu_tanh, quick_gelu or
    gelu."""

    def __init__(self, dim: int, width: int, kind: str, bias: bool):
        super().__init__()
        self.kind = kind
        gated = kind in ("swiglu", "geglu")
        self.up = FusedLinear(dim, (width, width), bias) if gated else nn.Linear(dim, width, bias)
        self.down = nn.Linear(width, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind in ("swiglu", "geglu"):
            gate, up = x.chunk(2, dim=-1)
            return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up)
        if self.kind == "relu2":
            return self.down(F.relu(x).square())
        if self.kind == "relu":
            return self.down(F.relu(x))
        return self.down(gelu(x, self.kind))
