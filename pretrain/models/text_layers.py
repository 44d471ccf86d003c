"""Parts of the text models: what attention may see, rotary positions, the key-value cache, attention and the head; `text_mlp.py` has norms and MLPs.

Shapes: B rows of T tokens, S keys, D features, H heads of width d, K heads of keys and values, F the MLP's width, V the vocabulary. Tokens are kept flat,
[B·T, D]: linear layers and norms see them all at once, attention by rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import fused
from pretrain.models.layers import Backbone, Rotation
from pretrain.models.layers import attend as attend_plainly
from pretrain.models.text_mlp import Fused, Linear, RMSNorm
from pretrain.ops.cross_entropy import cross_entropy
from pretrain.ops.products import on_cpu


class TextBackbone(Backbone):
    """forward(tokens long [B, T], documents=None, layers=1) -> Features.

    `documents`, int [B, T], numbers the document of each token within its row, -1 for padding; None: a row is one document. Attention does not cross
    documents, and positions begin anew in each. `head` predicts tokens from hidden states; it is called by what trains, as `backbone.head(…)`.
    """

    context: int  # longest sequence in training
    vocab_size: int
    head: Head
    blocks: nn.ModuleList

    def shard_units(self) -> list[nn.Module]:
        """The blocks: embedding, last norm and head belong to the objective around it, which calls the head when this module's forward is over."""
        return [*self.blocks]


class Scope(NamedTuple):
    """What all blocks share in one forward: the rows, the angles of their tokens, and who sees whom by the width of a block's window (0: all)."""

    batch: int
    length: int
    rotation: Rotation | None  # cos [T, 1, d] or [B, T, 1, d], its two halves alike, and sin of half that width; fp32
    masks: dict[int, Tensor]  # bool [B or 1, 1, T, S], true where a query sees a key; or float, added to the scores
    causal: bool  # what a window without a mask means: only what stands before, or everything


def document_positions(documents: Tensor) -> Tensor:
    """Positions that begin at 0 in each document: long [B, T] from documents [B, T]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(first, places, 0).cummax(1).values


def visible(queries: Tensor, keys: Tensor, window: int, documents: Tensor | None, causal: bool) -> Tensor:
    """bool [B or 1, 1, T, S] from the places of queries [T] and keys [S] in their rows. Padding sees padding, so that no row of scores is empty."""
    distance = queries.unsqueeze(1) - keys  # [T, S]
    seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen = seen & (distance < window)
    seen = seen[None, None]
    if documents is not None:
        seen = seen & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None = None) -> Tensor:
    """`layers.attend`, and in bf16 by products where these are a CPU's faster way."""
    if fused.short_in_bf16(q, k) and not (mask is not None and mask.requires_grad):
        groups = q.shape[1] // k.shape[1]
        k, v = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (k, v))
        return fused.attend_rows(q, k, v, mask, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    return attend_plainly(q, k, v, mask, causal, scale)


# ---------------------------------------------------------------- rotary positions
def rotary_tables(positions: Tensor, head_dim: int, base: float) -> Rotation:
    """cos [..., 1, d], twice the same, and sin [..., 1, d/2] of positions [...], fp32: angle j of position p is p · base^(-2j/d) (arXiv 2104.09864)."""
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = (positions.unsqueeze(-1).float() * rates).unsqueeze(-2)
    return torch.cat([angles, angles], dim=-1).cos(), angles.sin()


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Write x [B, T, J, d] to `out`, pairs (j, j + d/2) rotated by ± their tokens' angles, computed in fp32 or wider. A row at a time, to stay in cache."""
    half = x.shape[-1] // 2
    for i in range(len(x)):
        wide, turned = x[i], out[i]
        c, s = (cos[i], sin[i]) if cos.ndim == 4 else (cos, sin)
        if x.dtype in (torch.bfloat16, torch.float16):
            wide, turned = wide.float(), torch.empty(wide.shape, device=x.device)
        torch.mul(wide, c, out=turned)
        turned[..., :half].addcmul_(wide[..., half:], s, value=-sign)
        turned[..., half:].addcmul_(wide[..., :half], s, value=sign)
        if turned.dtype != out.dtype:
            out[i] = turned


class _Rotate(torch.autograd.Function):
    """Queries, keys and values [B, T, H + 2K, d] → [B, T, H, d], [B, T, K, d] rotated, and [B, T, K, d]. Backward writes one tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor):
        ctx.sizes = (heads, kv_heads)
        ctx.save_for_backward(cos, sin)
        v = x[:, :, heads + kv_heads :]
        turned = torch.empty(*x.shape[:2], heads + kv_heads, x.shape[3], dtype=x.dtype, device=x.device)
        _turn(x[:, :, : heads + kv_heads], turned, cos, sin, 1.0)
        # a copy of the values, as a view would keep queries and keys until the backward, too
        return turned[:, :, :heads], turned[:, :, heads:], v.contiguous()

    @staticmethod
    def backward(ctx, q: Tensor, k: Tensor, v: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        heads, kv_heads = ctx.sizes
        out = q.new_empty(*q.shape[:2], heads + 2 * kv_heads, q.shape[3])
        _turn(q, out[:, :, :heads], cos, sin, -1.0)
        _turn(k, out[:, :, heads : heads + kv_heads], cos, sin, -1.0)
        out[:, :, heads + kv_heads :] = v
        return out, None, None, None, None


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, T, J, d] rotated, as plain operations, for what is compiled and for normed queries and keys."""
    sin, cos = rotation[1], rotation[0][..., : x.shape[-1] // 2]
    a, b = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---------------------------------------------------------------- attention
class Cache:
    """Keys and values of the tokens that a decoder has seen, [B, K, S, d] for each block; `length` of the S places are filled."""

    def __init__(self, size: int):
        self.size, self.length = size, 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # by the block's number
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # of attention to an encoder's states, computed once

    def add(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values [B, K, T, d] behind those that are there; all of them so far."""
        end = self.length + k.shape[2]
        if end > self.size:
            raise ValueError(f"the cache has room for {self.size} tokens, not for {end}")
        if block not in self.held:
            shape = (*k.shape[:2], self.size, k.shape[3])
            self.held[block] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self.held[block]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


class SelfAttention(nn.Module):
    """Attention over each row of flat tokens; `window` as in `Scope.masks`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        qk_norm: float | None = None,
        window: int = 0,
        scale: float | None = None,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window, self.scale = heads, kv_heads, head_dim, window, scale
        self.qkv = Fused(dim, tuple(n * head_dim for n in (heads, kv_heads, kv_heads)), bias)
        self.proj = Linear(heads * head_dim, dim, bias)
        self.q_norm = RMSNorm(head_dim, qk_norm) if qk_norm is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm) if qk_norm is not None else None

    def forward(self, x: Tensor, scope: Scope, cache: Cache | None = None, block: int = 0) -> Tensor:
        qkv = self.qkv(x).view(scope.batch, scope.length, -1, self.head_dim)  # [B, T, H + 2K, d]
        q, k, v = (each.transpose(1, 2) for each in self._split(qkv, scope.rotation))
        if cache is not None:
            k, v = cache.add(block, k, v)
        mask = scope.masks.get(self.window)
        out = attend(q, k, v, mask, scope.causal and mask is None, self.scale)
        return self.proj(out.transpose(1, 2).reshape(len(x), -1))

    def _split(self, qkv: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Queries [B, T, H, d], keys and values [B, T, K, d], normed and rotated."""
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        plain = torch.compiler.is_compiling() or not on_cpu(qkv)
        if rotation is not None and self.q_norm is None and not plain:
            return _Rotate.apply(qkv, *sizes[:2], *rotation)
        q, k, v = qkv.split(sizes, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v


# ---------------------------------------------------------------- head
class Head(nn.Module):
    """Hidden states [..., D] → logits [..., V]; with targets long [...], the sum of their cross-entropies, without ever holding all logits.

    `embedding`: its weights are the head's, too (they are stored once, under the embedding's name). Logits are multiplied by `scale`, then become
    softcap · tanh(logits / softcap) (arXiv 2408.00118). Targets of -100 count for nothing.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        embedding: nn.Embedding | None = None,
        bias: bool = False,
        softcap: float | None = None,
        scale: float = 1.0,
        transform: nn.Module | None = None,
    ):
        super().__init__()
        self.softcap, self.scale, self.tied, self.transform = softcap, scale, embedding is not None, transform
        self.weight = embedding.weight if embedding is not None else nn.Parameter(torch.empty(vocab_size, dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None

    def forward(self, hidden: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """`z_loss` · logsumexp(logits)² of each target is added to its cross-entropy (arXiv 2204.02311)."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if targets is not None:
            options = {"bias": self.bias, "softcap": self.softcap, "scale": self.scale, "z_loss": z_loss}
            return cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten(), **options)
        logits = F.linear(hidden, self.weight, self.bias if self.scale == 1 else None)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1:
            logits = logits * self.scale if self.bias is None else logits * self.scale + self.bias
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap is not None else logits

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tied:
            del destination[prefix + "weight"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *rest):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        if self.tied and prefix + "weight" in missing:
            missing.remove(prefix + "weight")


# ---------------------------------------------------------------- initial weights
def initialise(module: nn.Module, depth: int, muon: bool = False) -> None:
    """Weights of all linear layers and embeddings below a module, biases zero; norms stay at one.

    Normal of 0.02 cut at three sigma, those that write to the residual stream ("proj", "down") divided by sqrt(2 · depth) (GPT-2). `muon` (nanochat):
    matrices uniform of variance 1/D, those that write to the stream zero, embeddings normal of 0.8 and heads of 0.001.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            _normal(part.weight, 0.8 if muon else 0.02)
        elif isinstance(part, Head) and not part.tied:
            _normal(part.weight, 0.001 if muon else 0.02)
        elif isinstance(part, nn.Linear):
            writes = name.rpartition(".")[2] in ("proj", "down")
            if muon:
                bound = 0.0 if writes else math.sqrt(3 / part.in_features)
                nn.init.uniform_(part.weight, -bound, bound)
            else:
                _normal(part.weight, 0.02 / math.sqrt(2 * depth) if writes else 0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _normal(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
