"""Text models of one stack: the causal decoder (GPT-2, LLaMA, Qwen3; arXiv 2302.13971) and the bidirectional encoder (BERT, arXiv 1810.04805).

Shapes: B rows of T tokens, D features, S tokens that a cache has seen with those that come now. `t5.py` has the encoder-decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import Features
from pretrain.models.presets import Decoder, TextEncoder, decoder_sizes
from pretrain.models.text_layers import (
    Cache,
    Head,
    Scope,
    SelfAttention,
    TextBackbone,
    document_positions,
    initialise,
    rotary_tables,
    visible,
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
        self.embed = nn.Embedding(cfg.vocab_size, dim)
        self.position_embed = nn.Embedding(cfg.context, dim) if cfg.positions == "learned" else None
        windows = [cfg.windows[i % len(cfg.windows)] if cfg.windows else 0 for i in range(cfg.depth)]
        self.blocks = nn.ModuleList(DecoderBlock(cfg, window) for window in windows)
        self.windows = sorted(set(windows))
        self.norm = norm(cfg.norm, dim, cfg.norm_eps)
        self.head = Head(dim, cfg.vocab_size, self.embed if cfg.tied else None, softcap=cfg.softcap)
        initialise(self, cfg.depth, muon=cfg.init == "muon")
        if cfg.init == "muon" and cfg.tied:  # as a head, an embedding of 0.8 would begin far from uniform predictions
            nn.init.normal_(self.embed.weight, std=0.02)

    def layer_of(self, name: str) -> tuple[int, int]:
        part, _, rest = name.partition(".")
        last = len(self.blocks) + 1
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1, last
        return (0 if part.endswith("embed") else last), last

    def forward(
        self, tokens: Tensor, *, documents: Tensor | None = None, cache: Cache | None = None, layers: int = 1
    ) -> Features:
        """See `TextBackbone`. With a cache, tokens are those that follow on what it has seen, and it has seen them, too, afterwards."""
        if cache is not None and documents is not None:
            raise ValueError("a cache holds one document per row; leave documents out")
        b, t = tokens.shape
        scope, positions = self._scope(b, t, documents, cache, tokens.device)
        x = self.embed(tokens)
        if self.position_embed is not None:
            x = x + self.position_embed(positions)
        x, outputs = x.flatten(0, 1), []
        for i, block in enumerate(self.blocks):
            x = block(x, scope, cache, i)
            if i >= len(self.blocks) - layers:
                outputs.append(self.norm(x).view(b, t, -1))
        if cache is not None:
            cache.length += t
        out = torch.cat(outputs, dim=-1) if layers > 1 else outputs[0]
        if documents is None:
            last = out[:, -1]
        else:  # of what is no padding
            place = (documents >= 0).long().mul(torch.arange(t, device=tokens.device)).amax(1)
            last = out[torch.arange(b, device=tokens.device), place]
        return Features(last, out, out[:, :0], (t,))

    def _scope(
        self, b: int, t: int, documents: Tensor | None, cache: Cache | None, device: torch.device
    ) -> tuple[Scope, Tensor]:
        """(what the blocks share, positions [T] or [B, T])."""
        seen = cache.length if cache is not None else 0
        if self.cfg.positions == "learned" and seen + t > self.context:
            raise ValueError(f"{seen + t} tokens, but model.context = {self.context} positions were learned")
        keys = torch.arange(seen + t, device=device)
        queries = keys[seen:]
        masks: dict[int, Tensor] = {}
        for window in self.windows:
            shorter = 0 < window < seen + t
            if documents is not None or shorter or (seen and t > 1):
                masks[window] = visible(queries, keys, window, documents, causal=True)
        positions = queries if documents is None else document_positions(documents)
        rotation = None
        if self.cfg.positions == "rope":
            rotation = rotary_tables(positions, self.head_dim, self.cfg.rope_base)
        return Scope(b, t, rotation, masks, causal=not seen), positions


class EncoderBlock(nn.Module):
    """Post-norm block on flat tokens [B·T, D]."""

    def __init__(self, cfg: TextEncoder):
        super().__init__()
        width = 4 * cfg.dim if cfg.mlp_width == "auto" else cfg.mlp_width
        self.attn = SelfAttention(cfg.dim, cfg.heads, cfg.heads, cfg.dim // cfg.heads, bias=True)
        self.norm1 = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.mlp = Mlp(cfg.dim, width, "gelu", bias=True)
        self.norm2 = nn.LayerNorm(cfg.dim, cfg.norm_eps)

    def forward(self, x: Tensor, scope: Scope) -> Tensor:
        x = self.norm1(x + self.attn(x, scope))
        return self.norm2(x + self.mlp(x))


class Transform(nn.Module):
    """What BERT's head does before it predicts: norm(gelu(dense x))."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps)

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
        self.embed_norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
        self.blocks = nn.ModuleList(EncoderBlock(cfg) for _ in range(cfg.depth))
        self.head = Head(cfg.dim, cfg.vocab_size, self.embed, bias=True, transform=Transform(cfg.dim, cfg.norm_eps))
        initialise(self, 0.5)  # outputs of blocks like all others: BERT's norms stand behind the sum

    def layer_of(self, name: str) -> tuple[int, int]:
        part, _, rest = name.partition(".")
        last = len(self.blocks) + 1
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1, last
        return (last if part == "head" else 0), last

    def forward(self, tokens: Tensor, *, documents: Tensor | None = None, layers: int = 1) -> Features:
        """See `TextBackbone`; `cls` is each row's first token."""
        b, t = tokens.shape
        if t > self.context:
            raise ValueError(f"{t} tokens, but model.context = {self.context} positions were learned")
        places = torch.arange(t, device=tokens.device)
        masks: dict[int, Tensor] = {}
        if documents is not None:
            masks[0] = visible(places, places, 0, documents, causal=False)
        positions = places if documents is None else document_positions(documents)
        x = self.embed(tokens) + self.position_embed(positions) + self.segment_embed(places.new_zeros(1))
        x, outputs = self.embed_norm(x).flatten(0, 1), []
        for i, block in enumerate(self.blocks):
            x = block(x, Scope(b, t, None, masks, causal=False))
            if i >= len(self.blocks) - layers:
                outputs.append(x.view(b, t, -1))
        out = torch.cat(outputs, dim=-1) if layers > 1 else outputs[0]
        return Features(out[:, 0], out, out[:, :0], (t,))
