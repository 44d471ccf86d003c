"""Parts that backbones share: what every backbone returns, the transformer block on a list of sequences, and its MLPs.

Shapes: B images, N tokens, D features, H heads, d = D / H. A list of inputs of several sizes is kept as one flat sequence [T, D],
T = Σ B·N, with `shapes` = [(B, N), …]: linear layers and norms see all tokens at once, attention sees each size by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import fused
from pretrain.ops.products import linear, on_cpu

Shapes = fused.Shapes
Rotation = tuple[Tensor, Tensor]  # cos, sin: [N, 1, d] or [B, N, 1, d], fp32, their two halves alike


class Features(NamedTuple):
    """What every backbone returns. With `layers=n` the last n blocks' outputs stand side by side in D."""

    cls: Tensor  # [B, D]     the pooled map for convolutional networks, the last token for a causal decoder
    tokens: Tensor  # [B, N, D]  patches, row-major; or tokens of text
    registers: Tensor  # [B, R, D]  R may be 0
    grid: tuple[int, ...]  # (h, w) of the whole input, also where only some patches were kept; (N,) for text


class Backbone(nn.Module):
    """forward(x, mask=None, keep=None, layers=1) -> Features; a list of inputs gives a list of Features.

    x: float [B, C, H, W]. mask: bool [B, N], these patches are replaced by a learned token. keep: long [B, K], the others are dropped.
    What reads text is a `TextBackbone`.
    """

    embed_dim: int
    image_size: int
    patch_size: int  # pixels per token along one side
    whole_patches = False  # whether an input's sides have to be multiples of it

    def shard_units(self) -> list[nn.Module]:
        """The modules that a sharded engine wraps, children before parents."""
        raise NotImplementedError

    def layer_of(self, name: str) -> tuple[int, int]:
        """(layer of a parameter, number of layers + 1), for layer-wise learning rates: 0 what embeds pixels, i + 1 block i, the last what follows."""
        raise NotImplementedError


def trunc_normal(linear: nn.Module) -> None:
    """Weights from a normal of 0.02 cut at two sigma, biases zero: the initialisation of ViT, MAE and DINO."""
    if isinstance(linear, nn.Linear):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Write queries, keys and values x [B, N, 3, H, d] to `out`, queries and keys rotated by ± their tokens' angles, computed in fp32 or wider.

    Pairs are (j, j + d/2). Both at once and before they are transposed: a quarter of the time of one by one after it, as rows in memory are longer.
    """
    half = x.shape[-1] // 2
    turned, wide = out[:, :, :2], x[:, :, :2]
    if x.dtype in (torch.bfloat16, torch.float16):
        wide, turned = wide.float(), torch.empty(wide.shape, device=x.device)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [..., N, 1, 1, d]
    torch.mul(wide, cos, out=turned)
    turned[..., :half].addcmul_(wide[..., half:], sin[..., half:], value=-sign)
    turned[..., half:].addcmul_(wide[..., :half], sin[..., :half], value=sign)
    if turned.dtype != out.dtype:
        out[:, :, :2] = turned
    out[:, :, 2] = x[:, :, 2]


class _Rotate(torch.autograd.Function):
    """Flat queries, keys and values [T, 3·D] → [B, N, 3, H, d] of each size, rotated. Backward turns the other way, into one flat tensor."""

    @staticmethod
    def forward(ctx, qkv: Tensor, shapes: Shapes, heads: int, *tables: Tensor):
        ctx.shapes, ctx.heads = shapes, heads
        ctx.save_for_backward(*tables)
        out = []
        for i, part in enumerate(qkv.split([b * n for b, n in shapes])):
            x = part.view(*shapes[i], 3, heads, -1)
            out.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
            _turn(x, out[-1], tables[2 * i], tables[2 * i + 1], 1.0)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        rows = sum(b * n for b, n in ctx.shapes)
        flat = grads[0].new_empty(rows, grads[0][0, 0].numel())
        for i, part in enumerate(flat.split([b * n for b, n in ctx.shapes])):
            cos, sin = ctx.saved_tensors[2 * i : 2 * i + 2]
            _turn(grads[i], part.view(grads[i].shape), cos, sin, -1.0)
        return (flat, *[None] * (2 + len(ctx.saved_tensors)))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v for q [B, H, T, d] and k, v [B, K, S, d]; scale is d^-1/2 unless given. `mask`: bool, or float to be added."""
    grouped = q.shape[1] != k.shape[1]
    if on_cpu(q) and q.dtype == torch.bfloat16 and q.requires_grad:
        # PyTorch's CPU kernel goes backward slower in bf16 than in fp32: this takes 7 to 11 % off a ViT-S step
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
            return out.to(torch.bfloat16)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


class QueryKeyValue(nn.Linear):
    """[T, D] → [T, 3·D], without a bias, with one, or with biases [2·D] for queries and values only: without rotary positions, softmax would drop one
    for keys anyway."""

    def __init__(self, dim: int, bias: bool = True, key_bias: bool = False):
        super().__init__(dim, 3 * dim, bias=bias)
        self.parts = (dim, dim, dim)  # rows of matrices that Muon treats one by one
        if bias and not key_bias:
            self.bias = nn.Parameter(torch.zeros(2 * dim))

    def whole_bias(self) -> Tensor | None:
        if self.bias is None or len(self.bias) == self.out_features:
            return self.bias
        query, value = self.bias.chunk(2)
        return torch.cat([query, torch.zeros_like(query), value])

    def forward(
        self, x: Tensor, shapes: Shapes | None = None, heads: int = 1, rotations: list[Rotation] | None = None
    ) -> Any:
        """With `shapes`, what `fused.query_key_value` makes of it."""
        if shapes is not None:
            return fused.query_key_value(x, self.weight, self.whole_bias(), shapes, heads, rotations)
        return linear(x, self.weight, self.whole_bias())


class Linear(nn.Linear):
    """residual + scale · (x Wᵀ + bias) of rows x [T, D']."""

    def forward(self, x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if fused.possible(x, self.weight):
            return fused.linear(x, self.weight, self.bias, scale, residual)
        out = linear(x, self.weight, self.bias)
        out = out if scale is None else out * scale
        return out if residual is None else residual + out


class Attention(nn.Module):
    """Multi-head self-attention over each sequence of a flat list; `scale` and `residual` as of the last `Linear`."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = QueryKeyValue(dim, qkv_bias, key_bias)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        shapes: Shapes,
        rotations: list[Rotation] | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        if fused.possible(x, self.qkv.weight) and max(n for _, n in shapes) <= fused.LONGEST * (
            x.shape[1] // self.heads
        ):
            return self.proj(fused.attend(self.qkv(x, shapes, self.heads, rotations)), scale, residual)
        qkv = self.qkv(x)
        if rotations is not None:
            parts = _Rotate.apply(qkv, shapes, self.heads, *(table for pair in rotations for table in pair))
        else:  # not split where there is but one size: split's backward is a copy
            pieces = qkv.split([b * n for b, n in shapes]) if len(shapes) > 1 else [qkv]
            parts = [piece.view(b, n, 3, self.heads, -1) for piece, (b, n) in zip(pieces, shapes, strict=True)]
        out = []
        for part, (b, n) in zip(parts, shapes, strict=True):
            # each [B, H, N, d]; taken apart before they are transposed, so that backward has one copy less (1 to 2 % of a ViT-S step)
            q, k, v = (each.transpose(1, 2) for each in part.unbind(2))
            out.append(attend(q, k, v).transpose(1, 2).reshape(b * n, -1))
        return self.proj(torch.cat(out) if len(out) > 1 else out[0], scale, residual)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)), scale, residual)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) · w2 x) (arXiv 2002.05202); `hidden` is the true width of w1 and w2."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = Linear(dim, hidden)
        self.w2 = Linear(dim, hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor, scale: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x), scale, residual)


class LayerScale(nn.Module):
    """A learned factor per feature (arXiv 2103.17239), which the last linear layer of a branch applies."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))


Branch = Callable[
    ..., Tensor
]  # (x, shapes, rotations, residual): residual + branch(x), or branch(x) where there is none


class DropPath(nn.Module):
    """x + branch(x), with the branch left out for a random share of the images (arXiv 1603.09382): it is computed for the others only, scaled up.

    Of the B images of each size max(⌊B·(1 − rate)⌋, 1) are kept (2304.07193 §5), each size with a draw of its own. In evaluation all are.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"model.drop_path = {rate}: must be at least 0 and below 1")
        self.rate = rate

    def forward(self, x: Tensor, shapes: Shapes, branch: Branch, rotations: list[Rotation] | None = None) -> Tensor:
        """x [T, D]; the branch gets the kept images' tokens, their shapes and rotations."""
        if not self.training or self.rate == 0:
            return branch(x, shapes, rotations, x)
        rows, kept, scales, turned, start = [], [], [], [], 0
        for i, (b, n) in enumerate(shapes):
            count = max(int(b * (1 - self.rate)), 1)
            images = torch.randperm(b, device=x.device)[:count]
            rows.append((start + images.unsqueeze(1) * n + torch.arange(n, device=x.device)).flatten())
            kept.append((count, n))
            scales.append(x.new_full((count * n, 1), b / count))
            if rotations is not None:  # those of dropped patches differ from image to image
                turned.append(tuple(r[images] if r.ndim == 4 else r for r in rotations[i]))
            start += b * n
        index = torch.cat(rows)
        out = branch(x.index_select(0, index), kept, turned or None)  # type: ignore[arg-type]
        return x.index_add(0, index, (out * torch.cat(scales)).to(x.dtype))


class Block(nn.Module):
    """Pre-norm transformer block (arXiv 2010.11929) on flat tokens [T, D]."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        key_bias: bool = True,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, heads, qkv_bias, key_bias)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = (Mlp if mlp == "gelu" else SwiGLU)(dim, int(dim * mlp_ratio + 1e-6))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, shapes: Shapes, rotations: list[Rotation] | None = None, last: int | None = None
    ) -> Tensor:
        """[T, D] → [T, D]; with `last`, only that many tokens at the end of each sequence pass the MLP and come out."""
        x = self.drop_path(x, shapes, self._mix, rotations)
        if last is not None:
            parts = zip(x.split([b * n for b, n in shapes]), shapes, strict=True)
            x = torch.cat([part.view(b, n, -1)[:, n - last :].flatten(0, 1) for part, (b, n) in parts])
            shapes = [(b, last) for b, _ in shapes]
        return self.drop_path(x, shapes, self._transform)

    def _mix(self, x: Tensor, shapes: Shapes, rotations: list[Rotation] | None, residual: Tensor | None = None):
        return self.attn(self.norm1(x), shapes, rotations, getattr(self.ls1, "gamma", None), residual)

    def _transform(self, x: Tensor, shapes: Shapes, rotations: list[Rotation] | None, residual: Tensor | None = None):
        return self.mlp(self.norm2(x), getattr(self.ls2, "gamma", None), residual)
