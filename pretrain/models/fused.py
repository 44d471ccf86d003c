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

from pretrain.ops.products import added, fp32_is_faster, on_cpu, product

Shapes = list[tuple[int, int]]
_on = True
LONGEST = 4  # tokens of a sequence for each feature of a head: longer ones' probabilities would be a great part of all activations, and no faster


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
    """x [T, D] → queries, keys and values [3, B, H, N, d] of each size, the first two rotated by (cos, sin) [N or B, N, 1, d]; in fp32 or wider, but
    in bf16 under its autocast on a CPU that multiplies it faster.

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


def short_in_bf16(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_rows` is for q and k [B, H, T, d], to be trained: with a CPU's own bf16 products it takes half of the time of PyTorch's kernel."""
    known = on_cpu(q) and q.dtype == torch.bfloat16 and q.requires_grad
    return known and _on and max(q.shape[2], k.shape[2]) <= LONGEST * q.shape[3] and not fp32_is_faster()


@torch.compiler.disable
def attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale + mask) v for q [B, H, T, d], k and v [B, H, S, d]; `mask` [B or 1, H or 1, T, S] without a gradient, or bool: who is seen."""
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    return _AttendRows.apply(q, k, v, mask, scale)


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
                return added(offset.to(ctx.compute), x, factors)
            out = residual + offset if scale is not None else residual + offset.to(ctx.compute)
            return added(out, x, factors) if out.dtype == ctx.compute else out.add_(x @ factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight, bias, scale = ctx.saved_tensors
        g = grad.to(ctx.compute)
        to_x = product(g, _Linear.scaled(weight, scale).to(ctx.compute)) if ctx.needs_input_grad[0] else None
        to_residual = grad if ctx.needs_input_grad[4] else None
        if not any(ctx.needs_input_grad[1:4]):
            return to_x, None, None, None, to_residual
        to_weight, to_bias, to_scale = product(g.t(), x).to(weight.dtype), _column_sums(g), None
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
            joint = product(x, ordered.to(ctx.compute).t())  # [T, 3·D]
        if bias is not None:
            bias = (_paired(bias, heads) if tables else bias).view(3, 1, heads, 1, -1)
        out = []
        for i, (rows, (b, n)) in enumerate(zip(joint.split([b * n for b, n in shapes]), shapes, strict=True)):
            rows = rows.view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, N, d]
            wide = torch.promote_types(rows.dtype, torch.float32)
            part = torch.empty(rows.shape, dtype=wide)
            part.copy_(rows) if bias is None else torch.add(rows, bias, out=part)
            if tables:
                _pairs(part[:2]).mul_(tables[i])
            out.append(part.to(rows.dtype) if rows.dtype == torch.bfloat16 and not fp32_is_faster() else part)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, weight, *tables = ctx.saved_tensors
        flat = grads[0].new_empty(len(x), len(weight), dtype=torch.promote_types(grads[0].dtype, torch.float32))
        for i, (rows, (b, n)) in enumerate(zip(flat.split([b * n for b, n in ctx.shapes]), ctx.shapes, strict=True)):
            rows = rows.view(b, n, 3, ctx.heads, -1).permute(2, 0, 3, 1, 4)
            if tables:
                torch.mul(_pairs(grads[i][:2].to(flat.dtype)), tables[i].conj().resolve_conj(), out=_pairs(rows[:2]))
                rows[2].copy_(grads[i][2])
            else:
                rows.copy_(grads[i])
        ordered = _paired(weight, ctx.heads) if tables else weight
        g = flat.to(ctx.compute)
        to_weight, to_bias = product(g.t(), x), _column_sums(flat)
        if tables:
            to_weight, to_bias = _paired(to_weight, ctx.heads, back=True), _paired(to_bias, ctx.heads, back=True)
        to_bias = to_bias if ctx.needs_input_grad[2] else None
        return (product(g, ordered.to(ctx.compute)), to_weight, to_bias, None, None, *[None] * len(tables))


def pieces(size: int, *tensors: Tensor) -> zip:
    """Tensors [B·H, …] cut alike, so that the probabilities of a piece, `size` for each of its heads, stay in a core's cache between the operations on
    it: 10 % less time."""
    return zip(*(tensor.split(max(1, 2**18 // size)) for tensor in tensors), strict=True)


def _mix(q: Tensor, k: Tensor, v: Tensor, p: Tensor, out: Tensor, scale: float, masked: bool = False) -> None:
    """Write softmax(q kᵀ · scale) to p [n, T, S], where the mask is if `masked`, and its product with v [n, S, d] to `out`. Scores are not rounded."""
    wide = torch.promote_types(p.dtype, torch.float32)
    s = p.to(wide).baddbmm_(q.to(wide), k.to(wide).mT, beta=int(masked), alpha=scale)  # p itself where it is wide
    torch.softmax(s, -1, out=s)
    if s is not p:
        p.copy_(s)
    torch.bmm(p, v, out=out)


def _unmix(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, to: list[Tensor], scale: float):
    """Write the gradients of `_mix` by queries, keys and values."""
    torch.bmm(p.mT, grad, out=to[2])
    s = torch._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)  # of what softmax was given
    torch.baddbmm(to[0], s, k, beta=0, alpha=scale, out=to[0])
    torch.baddbmm(to[1], s.mT, q, beta=0, alpha=scale, out=to[1])


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
                for q, k, v, p, o in pieces(n * n, *part.flatten(1, 2), kept[-1], mixed):
                    _mix(q, k, v, p, o, width**-0.5)
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
            cut = pieces(n * n, rows, *part.flatten(1, 2), probabilities, *out[-1].flatten(1, 2))
            for g, q, k, v, p, *to in cut:
                _unmix(g, q, k, v, p, to, width**-0.5)
            start += b * n
        return tuple(out)


class _AttendRows(torch.autograd.Function):
    """The same for queries, keys and values that are apart, with a mask."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float):
        b, heads, t, width = q.shape
        ctx.scale, flat = scale, [x.reshape(b * heads, -1, width) for x in (q, k, v)]
        p = q.new_empty(b * heads, t, k.shape[2])
        if mask is not None:
            p.view(b, heads, t, -1).copy_(mask)
        mixed = torch.empty_like(flat[0])
        with torch.autocast("cpu", enabled=False):
            for q, k, v, kept, out in pieces(p[0].numel(), *flat, p, mixed):
                _mix(q, k, v, kept, out, scale, masked=mask is not None)
        ctx.save_for_backward(*flat, p)
        return mixed.view(b, heads, t, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        *flat, p = ctx.saved_tensors
        to = [torch.empty_like(x) for x in flat]
        for g, q, k, v, kept, *out in pieces(p[0].numel(), grad.reshape(flat[0].shape), *flat, p, *to):
            _unmix(g, q, k, v, kept, out, ctx.scale)
        return *(x.view(*grad.shape[:2], *x.shape[1:]) for x in to), None, None
