"""Linear layers and attention on a CPU, in fewer passes over memory than PyTorch's own operations take: the same numbers but for rounding.

There, elementwise operations on activations cost what they read and write. So a factor per feature goes into the weights, a residual into the matrix
product, biases and the change of layout are one pass, rotary angles turn pairs that lie side by side, and a column of ones sums over tokens.
One thread of a Xeon, ViT-S: see "The DINOv3 step on a CPU" in docs/negative_results.md.

Shapes: T tokens of all sizes, D features, H heads, d = D / H; `shapes` = [(B, N), …], the sizes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Shapes = list[tuple[int, int]]
_on = True
_here = True
LONGEST = 4  # tokens of a sequence for each feature of a head: longer ones' probabilities would be a great part of all activations, and no faster


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


def possible(x: Tensor, weight: Tensor) -> bool:
    """Whether these functions are for x. Half precision would not hold weights times a small factor, which excludes fp16, and weights that FSDP2 has
    gathered in it; compilers and exporters want plain operations."""
    known = on_cpu(x) and weight.dtype in (torch.float32, torch.float64)
    return _on and known and _compute(x) != torch.float16 and not torch.compiler.is_compiling()


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Plain operations in the meantime: selective recomputation has to know which of them are matrix products."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + scale · (x Wᵀ + bias) of x [T, D'], with W [D, D'], bias and scale [D], residual [T, D]; without a scale or residual, as if 1 or 0."""
    return _Linear.apply(x, weight, bias, scale, residual)


def query_key_value(
    x: Tensor, weight: Tensor, bias: Tensor | None, shapes: Shapes, heads: int, rotations: list | None
) -> tuple[Tensor, ...]:
    """x [T, D] → queries, keys and values [3, B, H, N, d] of each size, in fp32 or wider, the first two rotated by (cos, sin) [N or B, N, 1, d].

    Within a head, j and j + d/2 then lie side by side in queries and keys, which their products do not see.
    """
    tables = []
    for cos, sin in rotations or []:
        half = cos.shape[-1] // 2
        table = torch.complex(cos[..., :half], sin[..., :half]).squeeze(-2)  # [N, d/2] or [B, N, d/2]
        tables.append(table if table.ndim == 2 else table.unsqueeze(1))
    return _QueryKeyValue.apply(x, weight, bias, shapes, heads, *tables)


def attend(parts: tuple[Tensor, ...]) -> Tensor:
    """softmax(q kᵀ / √d) v of each size's [3, B, H, N, d], flat: [T, D]."""
    return _Attend.apply(*parts)


def _compute(x: Tensor) -> torch.dtype:
    """The type that autocast gives to matrix products."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _column_sums(x: Tensor) -> Tensor:
    """x [T, D] → [D], in fp32 or wider; by a product with ones, a third of sum's time."""
    return x.new_ones(len(x)) @ x if x.dtype in (torch.float32, torch.float64) else x.sum(0, dtype=torch.float32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, residual: Tensor | None):
        ctx.compute = _compute(x)
        with torch.autocast("cpu", enabled=False):
            x = x.to(ctx.compute)
            ctx.save_for_backward(x, weight, bias, scale)
            factors = _Linear.scaled(weight, scale).to(ctx.compute).t()
            offset = bias if scale is None else bias * scale
            if residual is None:
                return torch.addmm(offset.to(ctx.compute), x, factors)
            out = residual + offset if scale is not None else residual + offset.to(ctx.compute)
            return torch.addmm(out, x, factors, out=out) if out.dtype == ctx.compute else out.add_(x @ factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight, bias, scale = ctx.saved_tensors
        g = grad.to(ctx.compute)
        to_x = g @ _Linear.scaled(weight, scale).to(ctx.compute) if ctx.needs_input_grad[0] else None
        to_residual = grad if ctx.needs_input_grad[4] else None
        if not any(ctx.needs_input_grad[1:4]):
            return to_x, None, None, None, to_residual
        to_weight, to_bias, to_scale = (g.t() @ x).to(weight.dtype), _column_sums(g), None
        if scale is not None:
            to_scale = (to_weight * weight).sum(1) + to_bias * bias
            to_weight, to_bias = to_weight.mul_(scale.unsqueeze(1)), to_bias * scale
        return to_x, to_weight, to_bias, to_scale, to_residual

    @staticmethod
    def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
        return weight if scale is None else weight * scale.unsqueeze(1)


def _pairs(x: Tensor) -> Tensor:
    """[..., d] with an even d as complex numbers [..., d/2] of neighbours, the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _paired(x: Tensor, heads: int, back: bool = False) -> Tensor:
    """Rows of queries, keys and values [3·D, ...] with j and j + d/2 of each head's queries and keys put side by side, or `back` again."""
    width = len(x) // (6 * heads)
    inner = (width, 2) if back else (2, width)
    rows = x.unflatten(0, (3, heads, *inner))
    return torch.cat([rows[:2].transpose(2, 3).flatten(0, 3), rows[2].flatten(0, 2)])


class _QueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shapes: Shapes, heads: int, *tables: Tensor):
        ctx.compute, ctx.shapes, ctx.heads = _compute(x), shapes, heads
        with torch.autocast("cpu", enabled=False):
            x = x.to(ctx.compute)
            ctx.save_for_backward(x, weight, *tables)
            ordered = _paired(weight, heads) if tables else weight
            product = x @ ordered.to(ctx.compute).t()  # [T, 3·D]
        if bias is not None:
            bias = (_paired(bias, heads) if tables else bias).view(3, 1, heads, 1, -1)
        out = []
        for i, (rows, (b, n)) in enumerate(zip(product.split([b * n for b, n in shapes]), shapes, strict=True)):
            rows = rows.view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, N, d]
            wide = torch.promote_types(rows.dtype, torch.float32)
            part = torch.empty(rows.shape, dtype=wide)
            part.copy_(rows) if bias is None else torch.add(rows, bias, out=part)
            if tables:
                _pairs(part[:2]).mul_(tables[i])
            out.append(part)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, weight, *tables = ctx.saved_tensors
        flat = grads[0].new_empty(len(x), len(weight))
        for i, (rows, (b, n)) in enumerate(zip(flat.split([b * n for b, n in ctx.shapes]), ctx.shapes, strict=True)):
            rows = rows.view(b, n, 3, ctx.heads, -1).permute(2, 0, 3, 1, 4)
            if tables:
                torch.mul(_pairs(grads[i][:2]), tables[i].conj().resolve_conj(), out=_pairs(rows[:2]))
                rows[2].copy_(grads[i][2])
            else:
                rows.copy_(grads[i])
        ordered = _paired(weight, ctx.heads) if tables else weight
        g = flat.to(ctx.compute)
        to_weight, to_bias = g.t() @ x, _column_sums(flat)
        if tables:
            to_weight, to_bias = _paired(to_weight, ctx.heads, back=True), _paired(to_bias, ctx.heads, back=True)
        to_bias = to_bias if ctx.needs_input_grad[2] else None
        return (g @ ordered.to(ctx.compute), to_weight, to_bias, None, None, *[None] * len(tables))


def pieces(n: int, *tensors: Tensor) -> zip:
    """Tensors [B·H, …] cut alike, so that the probabilities of a piece stay in a core's cache between the operations on it: 10 % less time."""
    return zip(*(tensor.split(max(1, 2**18 // n**2)) for tensor in tensors), strict=True)


class _Attend(torch.autograd.Function):
    """Products over several images and heads at once, with the probabilities [B·H, N, N] kept for backward."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor):
        _, _, heads, _, width = parts[0].shape
        out = parts[0].new_empty(sum(part.shape[1] * part.shape[3] for part in parts), heads * width)
        kept, start = [], 0
        with torch.autocast("cpu", enabled=False):
            for part in parts:
                _, b, _, n, _ = part.shape
                kept.append(part.new_empty(b * heads, n, n))
                mixed = part.new_empty(b * heads, n, width)
                for q, k, v, p, o in pieces(n, *part.flatten(1, 2), kept[-1], mixed):
                    torch.baddbmm(p, q, k.mT, beta=0, alpha=width**-0.5, out=p)
                    torch.softmax(p, -1, out=p)
                    torch.bmm(p, v, out=o)
                rows = out[start : start + b * n].view(b, n, heads, width)
                rows.copy_(mixed.view(b, heads, n, width).transpose(1, 2))
                start += b * n
        ctx.save_for_backward(*parts, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        saved = ctx.saved_tensors  # once: under recomputation, more is an error
        out, start = [], 0
        for part, probabilities in zip(saved[: len(saved) // 2], saved[len(saved) // 2 :], strict=True):
            _, b, heads, n, width = part.shape
            rows = grad[start : start + b * n].view(b, n, heads, width).transpose(1, 2).reshape(b * heads, n, width)
            out.append(torch.empty_like(part))
            cut = pieces(n, rows, *part.flatten(1, 2), probabilities, *out[-1].flatten(1, 2))
            for g, q, k, v, p, to_q, to_k, to_v in cut:
                torch.bmm(p.mT, g, out=to_v)
                s = torch._softmax_backward_data(g @ v.mT, p, -1, p.dtype)  # of what softmax was given
                torch.baddbmm(to_q, s, k, beta=0, alpha=width**-0.5, out=to_q)
                torch.baddbmm(to_k, s.mT, q, beta=0, alpha=width**-0.5, out=to_k)
            start += b * n
        return tuple(out)
