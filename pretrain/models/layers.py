"""Parts that backbones share: `Features`, which every backbone returns, the transformer block on packed sequences, and
its attention and MLPs.

Shapes: B images, N tokens, D features, H heads, d = D / H. Inputs of several sizes are packed into one tensor [T, D],
T = Σ B·N, with `shapes` = [(B, N), …]: linear layers and norms process all tokens at once, attention each size by
itself.

The residual stream has the compute dtype: autocast's where it is on, so that a step keeps the same activations in the
same dtype in every `parallel.mode`. Norms and layer scales return the dtype of their input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops.precision import wide

Shapes = list[tuple[int, int]]
Rotation = tuple[Tensor, Tensor]  # cos and sin of each token's angles, [T, 1, d/2] or [B, T, 1, d/2], fp32


class Features(NamedTuple):
    """The output of every backbone. With `layers=n` the outputs of the last n blocks are concatenated along D."""

    # [B, D]: class token; an attention pool of the patches; the pooled map of a convolutional network; the last token of
    # a decoder
    cls: Tensor
    tokens: Tensor  # [B, N, D]: patches in row-major order, or tokens of text
    registers: Tensor  # [B, R, D]; R may be 0
    grid: tuple[int, ...]  # (h, w) of the full input, even if only some patches were kept; (N,) for text


class Backbone(nn.Module):
    """forward(x, mask=None, keep=None, layers=1) -> Features; a list of inputs gives a list of Features.

    x: float [B, C, H, W]. mask: bool [B, N], true where a patch is replaced by a learned token. keep: long [B, K], the
    patches to encode; the others are dropped. Models that read text are `TextBackbone`s (text_layers.py).
    """

    embed_dim: int
    image_size: int
    patch_size: int  # pixels per token along one side
    max_layers = 1  # the largest value of `layers`
    whole_patches = False  # whether the sides of an input must be multiples of patch_size
    convolutional = False  # whether it is a convolutional network (`optim.layer_decay_of`)
    last_layer_parts: tuple[str, ...] = ("norm",)  # sub-modules after the blocks, see `layer_of`
    blocks: nn.ModuleList  # of a network that is a sequence of blocks
    loaded = False  # whether its weights were loaded (`init.backbone`), so that no others may be drawn
    training_only: tuple[str, ...] = ()  # options that an export turns off, with the sub-modules of the same names

    def about(self) -> dict[str, Any]:
        """The model's fields of `data_pipeline.parts.part.About`, which an objective's views get."""
        return {"image_size": self.image_size, "patch_size": self.patch_size}

    def example(self) -> Tensor:
        """A random input of two samples."""
        size: int = self.image_size
        return torch.randn(2, self.cfg.in_channels, size, size, generator=torch.Generator().manual_seed(0))

    def shard_units(self) -> list[nn.Module]:
        """The modules that a sharded engine wraps, children before parents."""
        return [*self.blocks, self]

    def layer_of(self, name: str) -> tuple[int, int]:
        """(layer of a parameter, index of the last layer), for layer-wise learning rates: block i is layer i + 1, what
        comes after the blocks is the last layer, and all other parameters, the embeddings, are layer 0."""
        part, _, rest = name.partition(".")
        last = len(self.blocks) + 1
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1, last
        return (last if part in self.last_layer_parts else 0), last


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: that of autocast if it is on, otherwise that of x."""
    kind = x.device.type
    mixed = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if mixed else x.dtype


class LayerNorm(nn.LayerNorm):
    """Layer norm (arXiv 1607.06450) in fp32 or wider, returned in the dtype of its input, which may be wider than its
    parameters."""

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.promote_types(self.weight.dtype, x.dtype)
        weight, bias = self.weight.to(kind), self.bias.to(kind)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864): in queries and keys [..., H, d], each pair of features (j, j + d/2) is
    rotated by an angle that depends on the position of its token. Computed in fp32 or wider."""

    def forward(self, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return self.turned(q, *rotation), self.turned(k, *rotation)

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = wide(x).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class QueryKeyValue(nn.Linear):
    """[T, D] → [T, 3·D], without a bias, with one, or with biases [2·D] for queries and values only.

    Without rotary positions, a bias of the keys has no effect on the softmax.
    """

    def __init__(self, dim: int, bias: bool = True, key_bias: bool = False):
        super().__init__(dim, 3 * dim, bias=bias)
        self.parts = (dim, dim, dim)  # rows of the stacked matrices, which Muon orthogonalises one by one
        if bias and not key_bias:
            self.bias = nn.Parameter(torch.zeros(2 * dim))

    def whole_bias(self) -> Tensor | None:
        if self.bias is None or len(self.bias) == self.out_features:
            return self.bias
        query, value = self.bias.chunk(2)
        return torch.cat([query, torch.zeros_like(query), value])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.whole_bias())


class PackedAttention(nn.Module):
    """softmax(q kᵀ / √d) v within each of the packed sequences; q, k and v [T, H, d] → [T, H, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        rows = [b * n for b, n in shapes]
        out = []
        for shape, *parts in zip(shapes, q.split(rows), k.split(rows), v.split(rows), strict=True):
            each = (part.unflatten(0, shape).transpose(1, 2) for part in parts)  # [B, H, N, d]
            out.append(F.scaled_dot_product_attention(*each).transpose(1, 2).flatten(0, 1))
        return torch.cat(out) if len(out) > 1 else out[0]


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762) within each of the packed sequences."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, key_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = QueryKeyValue(dim, qkv_bias, key_bias)
        self.rotary = Rotary()
        self.attend = PackedAttention()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shapes: Shapes, rotation: Rotation | None = None) -> Tensor:
        """x [T, D] → [T, D]."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # [T, H, d]
        if rotation is not None:
            q, k = self.rotary(q, k, rotation)
        return self.proj(self.attend(q, k, v, shapes).flatten(1))


def gelu(x: Tensor, kind: str = "gelu") -> Tensor:
    """GELU (arXiv 1606.08415): exact, by its tanh formula ("gelu_tanh"), or x · sigmoid(1.702 x) ("quick_gelu")."""
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, kind: str = "gelu"):
        super().__init__()
        self.kind = kind
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), self.kind))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) · w2 x) (arXiv 2002.05202); `hidden` is the true width of w1 and w2."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class AttentionPool(nn.Module):
    """One feature of all tokens [B, N, D] → [B, D]: a learned query attends to them, and a residual MLP follows (MAP,
    arXiv 2106.04560 appendix B, 1810.00825)."""

    def __init__(self, dim: int, heads: int, hidden: int, mlp: str, eps: float):
        super().__init__()
        self.heads = heads
        self.query_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps)
        self.mlp = Mlp(dim, hidden, mlp)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(self.query_token.to(x.dtype)).expand(len(x), -1, -1)  # [B, 1, D]
        parts = [query, *self.key_value(x).chunk(2, dim=-1)]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, 1 or N, d]
        pooled = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B, 1, D]
        return (pooled + self.mlp(self.norm(pooled))).squeeze(1)


class LayerScale(nn.Module):
    """x · gamma, a learned factor for each feature (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


class Branch(Protocol):
    """A residual branch: packed tokens x [T, D], their shapes and rotation → [T, D]."""

    def __call__(self, x: Tensor, shapes: Shapes, rotation: Rotation | None) -> Tensor: ...


class DropPath(nn.Module):
    """x + branch(x), where the branch is dropped for a random share of the images (arXiv 1603.09382), and scaled up for
    the others.

    The branch is computed only for the kept images: max(⌊B·(1 − rate)⌋, 1) of the B images of each size, drawn
    separately for each size (2304.07193 §5). In evaluation all images are kept.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"model.drop_path = {rate}: must be at least 0 and below 1")
        self.drop_rate = rate

    def forward(self, x: Tensor, shapes: Shapes, branch: Branch, rotation: Rotation | None = None) -> Tensor:
        """x [T, D]; the branch gets the kept images' tokens, their shapes and rotation."""
        if not self.training or self.drop_rate == 0:
            return x + branch(x, shapes, rotation)
        rows, kept, scales, start, wide = [], [], [], 0, torch.promote_types(x.dtype, torch.float32)
        for b, n in shapes:
            count = max(int(b * (1 - self.drop_rate)), 1)
            images = torch.randperm(b, device=x.device)[:count]
            rows.append((start + images.unsqueeze(1) * n + torch.arange(n, device=x.device)).flatten())
            kept.append((count, n))
            scales.append(torch.full((count * n, 1), b / count, dtype=wide, device=x.device))
            start += b * n
        index = torch.cat(rows)  # [T'], the kept images' tokens
        if rotation is not None:
            rotation = (rotation[0][index], rotation[1][index])
        out = branch(x.index_select(0, index), kept, rotation) * torch.cat(scales)
        return x.index_add(0, index, out.to(x.dtype))


class Block(nn.Module):
    """Pre-norm transformer block (arXiv 2010.11929) on packed tokens [T, D]."""

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
        self.norm1 = LayerNorm(dim, norm_eps)
        self.attn = Attention(dim, heads, qkv_bias, key_bias)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = LayerNorm(dim, norm_eps)
        hidden = int(dim * mlp_ratio + 1e-6)
        self.mlp = SwiGLU(dim, hidden) if mlp == "swiglu" else Mlp(dim, hidden, mlp)
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, shapes: Shapes, rotation: Rotation | None = None) -> Tensor:
        """[T, D] → [T, D]."""
        x = self.drop_path(x, shapes, self._mix, rotation)
        return self.drop_path(x, shapes, self._transform)

    def _mix(self, x: Tensor, shapes: Shapes, rotation: Rotation | None) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), shapes, rotation))

    def _transform(self, x: Tensor, shapes: Shapes, rotation: Rotation | None) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


def apply_blocks(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The output of `Block`s, one after the other, for sequences x of one length: [B, N, D] → [B, N, D]."""
    flat = x.flatten(0, 1)
    for block in blocks:
        flat = block(flat, [x.shape[:2]])
    return flat.view(x.shape)
