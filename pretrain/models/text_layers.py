"""Layers of the text models: attention masks, rotary positions, the key-value cache, attention and the head.
`text_mlp.py` has normalisation layers and MLPs.

Shapes: B rows of T tokens, S keys, D features, H heads of width d, K heads of keys and values, V tokens in the
vocabulary. Tokens are kept flat, [B·T, D]. Linear layers and norms process all of them at once; attention restores the
rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import Backbone, Rotary, Rotation
from pretrain.models.text_mlp import FusedLinear, RMSNorm
from pretrain.ops.cross_entropy import cross_entropy
from pretrain.ops.precision import wide


class TextBackbone(Backbone):
    """A backbone that reads tokens: forward(tokens long [B, T], documents=None, layers=1) -> Features.

    `documents`, int [B, T]: the number of each token's document within its row, −1 for padding; None: each row is one
    document. Attention does not cross the borders of documents, and positions start at 0 in each document. `head`
    predicts tokens from hidden states; objectives call it as `backbone.head(…)`.
    """

    last_layer_parts = ("norm", "head")
    causal = False  # whether a token attends to itself and earlier ones only
    context: int  # longest sequence in training
    vocab_size: int
    head: Head

    def about(self) -> dict[str, Any]:
        return {}

    def shard_units(self) -> list[nn.Module]:
        """The blocks. Embedding, last norm and head belong to the unit of the objective instead, because the objective
        calls the head after the forward of this module."""
        return [*self.blocks]


class Scope(NamedTuple):
    """The inputs that all blocks of a model share in one forward."""

    batch: int
    length: int
    rotation: Rotation | None
    # {width of the attention window of a block (0: no window): its mask}. A mask comes from `Masks`, or from T5's
    # `RelativeBias`, or is None.
    masks: dict[int, Any]
    causal: bool  # if the mask is None: whether a query attends only to itself and earlier tokens, or to all tokens


def document_positions(documents: Tensor) -> Tensor:
    """Positions that begin at 0 in each document: long [B, T] from documents [B, T]."""
    in_row = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return in_row - torch.where(first, in_row, 0).cummax(1).values


def visible(queries: Tensor, keys: Tensor, window: int, documents: Tensor | None, causal: bool) -> Tensor:
    """The attention mask, bool [B or 1, 1, T, S], true where a query attends to a key. `queries` [T] and `keys` [S] are
    positions in the row.

    Padding attends to padding, so that no row of the mask is empty, which would make the softmax NaN.
    """
    distance = queries.unsqueeze(1) - keys  # [T, S]
    seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen = seen & (distance < window)
    seen = seen[None, None]
    if documents is not None:
        seen = seen & (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    return seen


class Masks(nn.Module):
    """Computes the attention masks of one forward, which all blocks share. For each width of a window: bool
    [B or 1, 1, T, S], true where a query attends to a key; None if `Scope.causal` alone describes the mask."""

    def forward(
        self, queries: Tensor, keys: Tensor, windows: list[int], documents: Tensor | None, causal: bool
    ) -> list[Any]:
        """`queries` [T] and `keys` [S]: positions in the row; `windows`: widths in tokens, 0 for no window;
        `documents`: [B, T] or None."""
        partial = documents is not None or 1 < len(queries) < len(keys)
        return [visible(queries, keys, w, documents, causal) if partial or 0 < w < len(keys) else None for w in windows]


class MaskedAttention(nn.Module):
    """softmax(q kᵀ · scale + mask) v: q [B, T, H, d], k and v [B, S, K, d] with K key-value heads → [B, T, H, d]."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        """`mask`: bool [B or 1, 1, T, S], true where a query attends to a key, or float [B or 1, 1 or H, T, S], which
        is added to the scores; `scale`: d^-1/2 by default."""
        grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)


# ---------------------------------------------------------------- rotary positions
class RopeScaling(NamedTuple):
    """The scaling of rotary frequencies by which LLaMA 3.1 extends its context (arXiv 2407.21783).

    Frequencies of at most `low` turns in `context` tokens are divided by `factor`, those of at least `high` turns are
    kept, and frequencies in between are interpolated.
    """

    factor: float
    low: float
    high: float
    context: int

    def __call__(self, rates: Tensor) -> Tensor:
        """Scale frequencies, in radians per token."""
        turns = self.context * rates / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return rates * kept + rates / self.factor * (1 - kept)


def rotary_tables(positions: Tensor, head_dim: int, base: float, scaling: RopeScaling | None = None) -> Rotation:
    """cos and sin [..., 1, d/2], in fp32, of the rotary angles of positions [...]: angle j of position p is
    p · base^(−2j/d) (arXiv 2104.09864)."""
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    rates = rates if scaling is None else scaling(rates)
    angles = (positions.unsqueeze(-1).float() * rates).unsqueeze(-2)
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------- attention
class Cache:
    """The key-value cache of a decoder: for each block, the keys and values [B, S, K, d] of the tokens that it has
    processed. S is `size`, of which the first `length` entries are filled; the model advances `length` after all
    blocks.
    """

    def __init__(self, size: int):
        self.size, self.length = size, 0
        self.held: dict[int, tuple[Tensor, Tensor]] = {}  # {block: (keys, values)}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}  # the same for the states of an encoder, computed once

    def add(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values [B, T, K, d] of new tokens. Returns those of all tokens of the block so far,
        [B, length + T, K, d]. Raises ValueError if the cache is full."""
        end = self.length + k.shape[1]
        if end > self.size:
            raise ValueError(f"the cache has room for {self.size} tokens, not for {end}")
        if block not in self.held:
            shape = (k.shape[0], self.size, *k.shape[2:])
            self.held[block] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self.held[block]
        keys[:, self.length : end], values[:, self.length : end] = k, v
        return keys[:, :end], values[:, :end]


class SelfAttention(nn.Module):
    """Self-attention within each row of flat tokens: [B·T, D] → [B·T, D].

    `qk_norm`: the eps of an RMSNorm of queries and keys, None for no norm; `window`: the width of the attention window,
    by which `Scope.masks` is indexed."""

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
        self.qkv = FusedLinear(dim, tuple(n * head_dim for n in (heads, kv_heads, kv_heads)), bias)
        self.proj = nn.Linear(heads * head_dim, dim, bias)
        self.q_norm = RMSNorm(head_dim, qk_norm) if qk_norm is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm) if qk_norm is not None else None
        self.rotary = Rotary()
        self.attend = MaskedAttention()

    def forward(self, x: Tensor, scope: Scope, cache: Cache | None = None, block: int = 0) -> Tensor:
        qkv = self.qkv(x).view(scope.batch, scope.length, -1, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)  # [B, T, H, d], [B, T, K, d] twice
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if scope.rotation is not None:
            q, k = self.rotary(q, k, scope.rotation)
        if cache is not None:
            k, v = cache.add(block, k, v)
        mask = scope.masks.get(self.window)
        out = self.attend(q, k, v, mask, scope.causal and mask is None, self.scale)
        return self.proj(out.reshape(len(x), -1))


# ---------------------------------------------------------------- head
class Head(nn.Module):
    """Hidden states [..., D] → logits [..., V]. With targets long [...], it returns the sum of their cross-entropies
    instead, without materialising all logits; targets of −100 are ignored.

    `embedding`: an embedding with which the head shares its weights; they are stored once, under the embedding's name.
    `transform` is applied to the hidden states. Logits are multiplied by `scale`, then replaced by
    softcap · tanh(logits / softcap) (arXiv 2408.00118).
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
        """`z_loss` · logsumexp(logits)² is added to the cross-entropy of each target (arXiv 2204.02311)."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if targets is not None:
            options = {"bias": self.bias, "softcap": self.softcap, "scale": self.scale, "z_loss": z_loss}
            return cross_entropy(hidden.flatten(0, -2), self.weight, targets.flatten(), **options)
        logits = F.linear(hidden, self.weight, self.bias if self.scale == 1 else None)
        logits = wide(logits)
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
    """Initialise the weights of all linear layers, heads and embeddings in a module. Biases of linear layers become
    zero, and norms keep their weights of one.

    Weights are normal with std 0.02, truncated at three sigma. In layers that write to the residual stream ("proj",
    "down") the std is divided by sqrt(2 · depth), as in GPT-2. With `muon`, as in nanochat: linear layers are uniform
    with variance 1 / (input width), those that write to the residual stream are zero, embeddings are normal with std
    0.8, and heads with std 0.001.
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
