"""Linear layers under bf16 autocast on CPUs that multiply fp32 faster: the same products of operands rounded to bf16, by the fp32 kernel.

Without AMX, bf16 products on an Intel CPU run at about half the rate of fp32's. A product of two bf16 numbers is exact in fp32, and both kernels add up
in fp32, so rounding the operands and the result to bf16 around an fp32 product computes what the bf16 kernel does; gradients of weights are even left
unrounded. What is kept for backward is bf16, as with autocast.
"""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models import fused


@cache
def fp32_is_faster() -> bool:
    """Whether this CPU multiplies fp32 matrices clearly faster than bf16 ones: measured once in each process, in about 20 ms."""
    seconds = {}
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
            times = []
            for _ in range(6):
                start = time.perf_counter()
                a @ b
                times.append(time.perf_counter() - start)
            seconds[dtype] = min(times)
    return seconds[torch.float32] < 0.8 * seconds[torch.bfloat16]


def through_fp32(x: Tensor) -> bool:
    """Whether products with x are to be computed by the fp32 kernel though bf16 is asked for."""
    asked = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return fused.on_cpu(x) and asked and x.dtype != torch.float64 and fp32_is_faster()


def rounded(x: Tensor) -> Tensor:
    """fp32 with the values that bf16 has."""
    return x.bfloat16().float()


class _Linear(torch.autograd.Function):
    """x [N, I], weight [O, I], bias [O] or None → [N, O] in bf16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        narrow = x.bfloat16()
        ctx.save_for_backward(narrow, weight)
        ctx.kinds = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast("cpu", enabled=False):
            wide, w = narrow.float(), rounded(weight).t()
            out = wide @ w if bias is None else torch.addmm(rounded(bias), wide, w)
        return out.bfloat16()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        kinds, needed = ctx.kinds, ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            grad = grad.float()
            dx = (grad @ rounded(weight)).to(kinds[0]) if needed[0] else None
            dw = (grad.t() @ x.float()).to(kinds[1]) if needed[1] else None
            db = grad.sum(0).to(kinds[2]) if needed[2] else None
        return dx, dw, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for x [..., I], weight [O, I]."""
    if not through_fp32(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))
