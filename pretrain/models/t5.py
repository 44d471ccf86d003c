"""T5 (arXiv 1910.10683), v1.0 and v1.1: an encoder and a decoder of pre-norm blocks with relative positions and without
biases.

Shapes: B rows, S tokens in the encoder, T in the decoder, D features, H heads of width d.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.families import EncoderDecoder
from pretrain.models.layers import Features, compute_dtype
from pretrain.models.text_layers import Cache, Head, MaskedAttention, Scope, SelfAttention, TextBackbone, visible
from pretrain.models.text_mlp import FusedLinear, Mlp, RMSNorm


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances, which is added to the attention scores of a stack (§2.1).

    Half of the buckets hold one distance each; the others are logarithmic up to `max_distance`. With `both_sides`, half
    of the buckets are for each direction.
    """

    def __init__(self, cfg: EncoderDecoder, both_sides: bool):
        super().__init__()
        self.both_sides, self.max_distance = both_sides, cfg.max_distance
        self.weight = nn.Parameter(torch.empty(cfg.buckets, cfg.heads))

    def forward(self, queries: Tensor, keys: Tensor, documents: Tensor | None = None) -> Any:
        """The mask of a stack, float [B or 1, H, T, S], from the positions of queries [T] and keys [S]: −inf across the
        borders of `documents` [B, T] and, without `both_sides`, for later keys."""
        bias = self.weight[self.buckets(keys - queries.unsqueeze(1))].permute(2, 0, 1).unsqueeze(0)
        if documents is None and self.both_sides:
            return bias
        return bias.masked_fill(~visible(queries, keys, 0, documents, causal=not self.both_sides), float("-inf"))

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each distance of a key from its query, in tokens."""
        count = len(self.weight)
        base = torch.zeros_like(distance)
        if self.both_sides:
            count //= 2
            base = (distance > 0).long() * count
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (far * (count - exact)).long()).clamp(max=count - 1)
        return base + torch.where(distance < exact, distance, far)


def _attention(cfg: EncoderDecoder) -> SelfAttention:
    return SelfAttention(cfg.dim, cfg.heads, cfg.heads, cfg.head_dim, bias=False, scale=1.0)


class EncoderBlock(nn.Module):
    """Pre-norm block on flat tokens [B·S, D] → [B·S, D]."""

    def __init__(self, cfg: EncoderDecoder):
        super().__init__()
        self.norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = _attention(cfg)
        self.norm2 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = Mlp(cfg.dim, cfg.mlp_width, cfg.mlp, bias=False)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        x = x + self.attn(self.norm1(x), scope)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Attention of the decoder's tokens to the encoder's states, without scaling and positions."""

    def __init__(self, cfg: EncoderDecoder):
        super().__init__()
        self.heads, width = cfg.heads, cfg.heads * cfg.head_dim
        self.q = nn.Linear(cfg.dim, width, bias=False)
        self.kv = FusedLinear(cfg.dim, (width, width), bias=False)
        self.attend = MaskedAttention()
        self.proj = nn.Linear(width, cfg.dim, bias=False)

    def forward(
        self, x: Tensor, batch: int, memory: Tensor, mask: Tensor | None, cache: Cache | None, block: int
    ) -> Tensor:
        """Flat tokens x [B·T, D] → [B·T, D]; memory [B, S, D]; mask bool [B, 1, 1, S], true where a state may be
        seen."""
        q = self.q(x).view(batch, -1, self.heads, self.q.out_features // self.heads)  # [B, T, H, d]
        held = cache.memory.get(block) if cache is not None else None
        if held is None:
            held = self.kv(memory).view(batch, memory.shape[1], 2, self.heads, -1).unbind(2)  # [B, S, H, d] each
            if cache is not None:
                cache.memory[block] = held
        return self.proj(self.attend(q, *held, mask, scale=1.0).reshape(len(x), -1))


class DecoderBlock(nn.Module):
    """Pre-norm block: self-attention, attention to the encoder's states, MLP."""

    def __init__(self, cfg: EncoderDecoder):
        super().__init__()
        self.norm1 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = _attention(cfg)
        self.norm2 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.cross = CrossAttention(cfg)
        self.norm3 = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = Mlp(cfg.dim, cfg.mlp_width, cfg.mlp, bias=False)

    def forward(
        self, x: Tensor, scope: Scope, memory: Tensor, mask: Tensor | None, cache: Cache | None = None, block: int = 0
    ) -> Tensor:
        """x [B·T, D] → [B·T, D]; memory [B, S, D]; mask bool [B, 1, 1, S], true where a state may be seen.

        `cache` holds keys and values of earlier tokens, under the number `block`.
        """
        x = x + self.attn(self.norm1(x), scope, cache, block)
        x = x + self.cross(self.norm2(x), scope.batch, memory, mask, cache, block)
        return x + self.mlp(self.norm3(x))


class DecoderStack(nn.Module):
    """The decoder: tokens long [B, T], memory [B, S, D], memory_mask bool [B, S] (true where a state may be seen) → [B,
    T, D], after the last norm."""

    causal = True

    def __init__(self, cfg: EncoderDecoder, embed: nn.Embedding):
        super().__init__()
        self._embed = [embed]  # the encoder's, which owns it
        self.relative = RelativeBias(cfg, both_sides=False)
        self.blocks = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.decoder_depth or cfg.depth))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self, tokens: Tensor, memory: Tensor, memory_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """With a cache, `tokens` follow the tokens that it holds, and `memory` must be the same in all calls."""
        b, t = tokens.shape
        seen = cache.length if cache is not None else 0
        keys = torch.arange(seen + t, device=tokens.device)
        bias = self.relative(keys[seen:], keys)
        mask = memory_mask[:, None, None] if memory_mask is not None else None
        x, scope = self._embed[0](tokens).flatten(0, 1), Scope(b, t, None, {0: bias}, causal=False)
        x = x.to(compute_dtype(x))
        for i, block in enumerate(self.blocks):
            x = block(x, scope, memory, mask, cache, i)
        if cache is not None:
            cache.length += t
        return self.norm(x).view(b, t, -1)


class EncoderDecoderTransformer(TextBackbone):
    """The encoder, whose features are evaluated, with the decoder as `decoder`; `head` reads the decoder's states."""

    def __init__(self, cfg: EncoderDecoder):
        super().__init__()
        if cfg.max_distance <= cfg.buckets // 2:
            raise ValueError(
                f"model.max_distance = {cfg.max_distance}: must be above half of model.buckets = {cfg.buckets},"
                " which are for single distances"
            )
        self.cfg, self.embed_dim, self.context, self.vocab_size = cfg, cfg.dim, cfg.context, cfg.vocab_size
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.relative = RelativeBias(cfg, both_sides=True)
        self.blocks = nn.ModuleList(EncoderBlock(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.decoder = DecoderStack(cfg, self.embed)
        self.head = Head(
            cfg.dim, cfg.vocab_size, self.embed if cfg.tied else None, scale=cfg.dim**-0.5 if cfg.tied else 1.0
        )
        self._initialise()

    def _initialise(self) -> None:
        """Matrices are normal with variance 1 / fan-in. Those of queries are also divided by sqrt(d), because attention
        scores are not scaled (mesh TensorFlow)."""
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
                if name.endswith(("qkv", "cross.q")):
                    width = self.cfg.heads * self.cfg.head_dim
                    with torch.no_grad():
                        part.weight[:width].mul_(self.cfg.head_dim**-0.5)
            elif isinstance(part, RelativeBias):
                nn.init.normal_(part.weight, std=self.cfg.dim**-0.5)
        nn.init.normal_(self.embed.weight, std=1.0)
        if not self.cfg.tied:
            nn.init.normal_(self.head.weight, std=self.cfg.dim**-0.5)

    def shard_units(self) -> list[nn.Module]:
        return [*self.blocks, *self.decoder.blocks]

    def layer_of(self, name: str) -> tuple[int, int]:
        """The blocks of the decoder are numbered after those of the encoder."""
        depth, last = len(self.blocks), len(self.blocks) + len(self.decoder.blocks) + 1
        parts = name.split(".")
        if parts[0] == "blocks":
            return int(parts[1]) + 1, last
        if parts[:2] == ["decoder", "blocks"]:
            return depth + int(parts[2]) + 1, last
        if parts[0] == "norm":
            return depth + 1, last
        return (0 if parts[0] in ("embed", "relative") else last), last

    def forward(self, tokens: Tensor, *, documents: Tensor | None = None, layers: int = 1) -> Features:
        """Features of the encoder; `cls` is each row's first token."""
        b, t = tokens.shape
        places = torch.arange(t, device=tokens.device)
        scope = Scope(b, t, None, {0: self.relative(places, places, documents)}, causal=False)
        x, outputs = self.embed(tokens).flatten(0, 1), []
        x = x.to(compute_dtype(x))
        for i, block in enumerate(self.blocks):
            x = block(x, scope)
            if i >= len(self.blocks) - layers:
                outputs.append(self.norm(x).view(b, t, -1))
        out = torch.cat(outputs, dim=-1) if layers > 1 else outputs[0]
        return Features(out[:, 0], out, out[:, :0], (t,))
