"""Text models of one stack: the causal decoder (GPT-2, LLaMA, Qwen3; arXiv 2302.13971) and the bidirectional encoder
(BERT, arXiv 1810.04805).

Shapes: B rows of T tokens, D features, S tokens of the cache together with the new ones. `t5.py` has the
encoder-decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.families import Decoder, TextEncoder, decoder_sizes
from pretrain.models.layers import Features, LayerNorm, compute_dtype
from pretrain.models.text_layers import (
    Cache,
    Head,
    Masks,
    RopeScaling,
    Scope,
    SelfAttention,
    TextBackbone,
    document_positions,
    initialise,
    rotary_tables,
)
from pretrain.models.text_mlp import Mlp, norm


class DecoderBlock(nn.Module):
    """Pre-norm block on flat tokens [B·T, D]."""

    def __init__(self, cfg: Decoder, window: int):
        super().__init__()
        dim, heads, kv_heads, head_dim, width = decoder_sizes(cfg)
        self.norm1 = norm(cfg.norm, dim, cfg.norm_eps)
        qk_norm = cfg.norm_eps if cfg.qk_norm else None
        self.attn = SelfAttention(dim, heads, kv_heads, head_dim, cfg.bias, qk_norm, window)
        self.norm2 = norm(cfg.norm, dim, cfg.norm_eps)
        self.mlp = Mlp(dim, width, cfg.mlp, cfg.bias)

    def forward(self, x: Tensor, scope: Scope, cache: Cache | None = None, block: int = 0) -> Tensor:
        x = x + self.attn(self.norm1(x), scope, cache, block)
        return x + self.mlp(self.norm2(x))


class DecoderTransformer(TextBackbone):
    def __init__(self, cfg: Decoder):
        super().__init__()
        dim, _, _, self.head_dim, _ = decoder_sizes(cfg)
        if cfg.softcap is not None and cfg.softcap <= 0:
            raise ValueError(f"model.softcap = {cfg.softcap}: must be above 0, or null")
        if any(window < 0 for window in cfg.windows):
            raise ValueError(f"model.windows = {cfg.windows}: numbers of tokens, or 0 for all")
        self.cfg, self.embed_dim, self.context, self.vocab_size = cfg, dim, cfg.context, cfg.vocab_size
        self.causal = not cfg.bidirectional
        self.embed = nn.Embedding(cfg.vocab_size, dim)
        self.position_embed = nn.Embedding(cfg.context, dim) if cfg.positions == "learned" else None
        windows = [cfg.windows[i % len(cfg.windows)] if cfg.windows else 0 for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(DecoderBlock(cfg, window) for window in windows)
        self.windows = sorted(set(windows))
        self.masks = Masks()
        self.norm = norm(cfg.norm, dim, cfg.norm_eps)
        self.head = Head(dim, cfg.vocab_size, self.embed if cfg.tied else None, softcap=cfg.softcap)
        self.rope_base = cfg.rope_base if cfg.positions == "rope" else None
        scaling = RopeScaling(cfg.rope_factor, cfg.rope_low, cfg.rope_high, cfg.rope_context)
        self.rope_scaling = None if cfg.rope_factor == 1 else scaling
        initialise(self, cfg.depth, muon=cfg.init == "muon")
        if cfg.init == "muon" and cfg.tied:  # with std 0.8, a shared head would start far from uniform predictions
            nn.init.normal_(self.embed.weight, std=0.02)

    def forward(
        self, tokens: Tensor, *, documents: Tensor | None = None, cache: Cache | None = None, layers: int = 1
    ) -> Features:
        """See `TextBackbone`. With a cache, `tokens` follow the tokens that it holds, and are added to it."""
        if cache is not None and documents is not None:
            raise ValueError("a cache holds one document per row; leave documents out")
        b, t = tokens.shape
        scope, positions = self._scope(b, t, documents, cache, tokens.device)
        x = self.embed(tokens)
        if self.position_embed is not None:
            x = x + self.position_embed(positions)
        x, outputs = x.to(compute_dtype(x)).flatten(0, 1), []
        for i, block in enumerate(self.blocks):
            x = block(x, scope, cache, i)
            if i >= len(self.blocks) - layers:
                outputs.append(self.norm(x).view(b, t, -1))
        if cache is not None:
            cache.length += t
        out = torch.cat(outputs, dim=-1) if layers > 1 else outputs[0]
        if documents is None:
            last = out[:, -1]
        else:  # the last token that is not padding
            place = (documents >= 0).long().mul(torch.arange(t, device=tokens.device)).amax(1)
            last = out[torch.arange(b, device=tokens.device), place]
        return Features(last, out, out[:, :0], (t,))

    def _scope(
        self, b: int, t: int, documents: Tensor | None, cache: Cache | None, device: torch.device
    ) -> tuple[Scope, Tensor]:
        """(the blocks' shared inputs, positions [T] or [B, T])."""
        seen = cache.length if cache is not None else 0
        if self.cfg.positions == "learned" and seen + t > self.context:
            raise ValueError(f"{seen + t} tokens, but model.context = {self.context} positions were learned")
        keys = torch.arange(seen + t, device=device)
        queries = keys[seen:]
        masks = dict(zip(self.windows, self.masks(queries, keys, self.windows, documents, self.causal), strict=True))
        positions = queries if documents is None else document_positions(documents)
        rotation = None
        if self.rope_base is not None:
            rotation = rotary_tables(positions, self.head_dim, self.rope_base, self.rope_scaling)
        return Scope(b, t, rotation, masks, causal=self.causal and not seen), positions


class EncoderBlock(nn.Module):
    """Post-norm block on flat tokens [B·T, D]."""

    def __init__(self, cfg: TextEncoder):
        super().__init__()
        width = 4 * cfg.dim if cfg.mlp_width == "auto" else cfg.mlp_width
        self.attn = SelfAttention(cfg.dim, cfg.heads, cfg.heads, cfg.dim // cfg.heads, bias=True)
        self.norm1 = LayerNorm(cfg.dim, cfg.norm_eps)
        self.mlp = Mlp(cfg.dim, width, "gelu", bias=True)
        self.norm2 = LayerNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        x = self.norm1(x + self.attn(x, scope))
        return self.norm2(x + self.mlp(x))


class Transform(nn.Module):
    """The transformation in BERT's head before the prediction: norm(gelu(dense x))."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class EncoderTransformer(TextBackbone):
    def __init__(self, cfg: TextEncoder):
        super().__init__()
        if cfg.dim % cfg.heads:
            raise ValueError(f"model.dim = {cfg.dim}: must be a multiple of model.heads = {cfg.heads}")
        self.cfg, self.embed_dim, self.context, self.vocab_size = cfg, cfg.dim, cfg.context, cfg.vocab_size
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.position_embed = nn.Embedding(cfg.context, cfg.dim)
        self.segment_embed = nn.Embedding(cfg.segments, cfg.dim)
        self.embed_norm = LayerNorm(cfg.dim, cfg.norm_eps)
        self.masks = Masks()
        self.blocks = nn.ModuleList(EncoderBlock(cfg) for _ in range(cfg.depth))
        self.head = Head(cfg.dim, cfg.vocab_size, self.embed, bias=True, transform=Transform(cfg.dim, cfg.norm_eps))
        initialise(self, 0.5)  # depth 0.5: all layers get std 0.02, because BERT normalises after the residual sum

    def forward(self, tokens: Tensor, *, documents: Tensor | None = None, layers: int = 1) -> Features:
        """See `TextBackbone`; `cls` is each row's first token."""
        b, t = tokens.shape
        if t > self.context:
            raise ValueError(f"{t} tokens, but model.context = {self.context} positions were learned")
        places = torch.arange(t, device=tokens.device)
        masks = self.masks(places, places, [0], documents, self.causal)
        scope = Scope(b, t, None, {0: masks[0]}, causal=False)
        positions = places if documents is None else document_positions(documents)
        x = self.embed(tokens) + self.position_embed(positions) + self.segment_embed(places.new_zeros(1))
        x, outputs = self.embed_norm(x.to(compute_dtype(x))).flatten(0, 1), []
        for i, block in enumerate(self.blocks):
            x = block(x, scope)
            if i >= len(self.blocks) - layers:
                outputs.append(x.view(b, t, -1))
        out = torch.cat(outputs, dim=-1) if layers > 1 else outputs[0]
        return Features(out[:, 0], out, out[:, :0], (t,))
