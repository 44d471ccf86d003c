"""Matrix products on CPUs by the kernel that is the faster one there, which is not always PyTorch's choice.

In fp32 PyTorch calls MKL, which leaves AVX-512 to Intel's own CPUs: on others that have it, oneDNN's kernels are more than twice as fast.

In bf16, without AMX, products on an Intel CPU run at about half the rate of fp32's. A product of two bf16 numbers is exact in fp32, and both kernels add
up in fp32, so rounding the operands and the result to bf16 around an fp32 product computes what the bf16 kernel does; gradients of weights are even left
unrounded. What is kept for backward is bf16, as with autocast.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_here = True


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, for what is done in another way there."""
    return _here and x.device.type == "cpu"


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In the meantime tensors on the CPU stand for those of another device: for a plan."""
    global _here
    before, _here = _here, False
    try:
        yield
    finally:
        _here = before


onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # where PyTorch is built with it


def _onednn_is_faster() -> bool:
    """Whether oneDNN has AVX-512 kernels for this CPU where MKL has none. Not measured, so that all processes, and later ones, come to the same."""
    if not (onednn and torch.backends.mkl.is_available()) or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpus = Path("/proc/cpuinfo")
    return cpus.is_file() and b"GenuineIntel" not in cpus.read_bytes()


ONEDNN_IS_FASTER = _onednn_is_faster()
LEAST = 1 << 22  # multiplications of a product that oneDNN is called for: the call takes 10 us
ROWS = 32  # at least: products of fewer read the weights more than they multiply


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a [N, I] @ b [I, O] is to be computed by oneDNN."""
    if not ONEDNN_IS_FASTER or not on_cpu(a) or torch.compiler.is_exporting():
        return False
    return a.dtype == b.dtype == torch.float32 and len(a) >= ROWS and len(a) * b.numel() >= LEAST


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, I] @ b [I, O] by a CPU's faster kernel; for `autograd.Function`s, as oneDNN's has no gradient."""
    if not by_onednn(a, b):
        return a @ b
    return (_opaque if torch.compiler.is_compiling() else _by_onednn)(a, b, None)


def added(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + a [N, I] @ b [I, O], as `product`; a base [O] is left as it is, one [N, O] may be written over."""
    if not by_onednn(a, b):
        return torch.addmm(base, a, b, out=base if base.ndim == 2 else None)
    if base.ndim == 2:
        return base.add_(product(a, b))
    return (_opaque if torch.compiler.is_compiling() else _by_onednn)(a, b, base)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return onednn(a, b.t(), bias, "none", [], "")


# torch.compile knows oneDNN's operation for frozen weights only
_opaque = torch.library.custom_op(
    "unlabeled::product", _by_onednn, mutates_args=(), schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor"
)
_opaque.register_fake(lambda a, b, bias: a.new_empty(len(a), b.shape[1]))


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
    return on_cpu(x) and asked and x.dtype != torch.float64 and fp32_is_faster()


def rounded(x: Tensor) -> Tensor:
    """fp32 with the values that bf16 has."""
    return x.bfloat16().float()


class _Linear(torch.autograd.Function):
    """x [N, I], weight [O, I], bias [O] or None → [N, O]; `narrow`: in bf16, of operands rounded to it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: bool):
        kept = x.bfloat16() if narrow else x
        ctx.save_for_backward(kept, weight)
        ctx.narrow, ctx.kinds = narrow, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast("cpu", enabled=False):
            if narrow:
                weight, bias = rounded(weight), None if bias is None else rounded(bias)
            out = product(kept.float(), weight.t()) if bias is None else added(bias, kept.float(), weight.t())
        return out.bfloat16() if narrow else out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        kinds, needed = ctx.kinds, ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            grad = grad.float()
            dx = product(grad, rounded(weight) if ctx.narrow else weight).to(kinds[0]) if needed[0] else None
            dw = product(grad.t(), x.float()).to(kinds[1]) if needed[1] else None
            db = grad.sum(0).to(kinds[2]) if needed[2] else None
        return dx, dw, db, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for x [..., I], weight [O, I]."""
    rows, narrow = x.flatten(0, -2), through_fp32(x)
    if narrow or (by_onednn(rows, weight.t()) and not torch.is_autocast_enabled("cpu")):
        return _Linear.apply(rows, weight, bias, narrow).view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)
