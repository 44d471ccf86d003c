"""A decoder that writes the caption of an image: a transformer with cross-attention to the patches, as in Cap and CapPa
(arXiv 2306.07915) and LocCa (2403.19596). It is used in training only.

Shapes: B images with N patches of width M, captions of T tokens, D width, H heads, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import LayerNorm, Mlp, compute_dtype
from pretrain.models.text_layers import Head, initialise


class CaptionAttention(nn.Module):
    """Attention of tokens [B, T, D] to `memory` [B, S, M], which may be the tokens themselves."""

    def __init__(self, dim: int, memory_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool [B, 1, T, S], true where a token attends to a place of the memory."""
        parts = [self.query(x), *self.key_value(memory).chunk(2, dim=-1)]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # [B, H, T or S, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class CaptionBlock(nn.Module):
    """Pre-norm block: self-attention, attention to the patches, MLP."""

    def __init__(self, dim: int, memory_dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim, 1e-6) for _ in range(3))
        self.attn, self.cross = CaptionAttention(dim, dim, heads), CaptionAttention(dim, memory_dim, heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, mask)
        x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class CaptionDecoder(nn.Module):
    """forward(tokens, targets, parallel, patches) -> the sum of the cross-entropies of the targets, a scalar.

    tokens: long [B, T]; targets: long [B, T], the token at each place, or -100; parallel: bool [B]; patches [B, N, M].
    In a caption that is not parallel, each token is predicted from those before it. In a parallel one, all are predicted
    from the image alone: every place holds a mask token, and sees all places (2306.07915 §3.2).
    """

    def __init__(self, vocab_size: int, context: int, dim: int, memory_dim: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(context, dim))
        self.start, self.mask = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(CaptionBlock(dim, memory_dim, heads) for _ in range(depth))
        self.norm = LayerNorm(dim, 1e-6)
        self.head = Head(dim, vocab_size)
        initialise(self, depth)
        for vector in (self.positions, self.start, self.mask):
            nn.init.normal_(vector, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor, parallel: Tensor, patches: Tensor) -> Tensor:
        count, length = tokens.shape
        start = self.start.expand(count, 1, -1)
        x = torch.cat([start, self.embed(tokens[:, :-1])], dim=1)  # [B, T, D]
        x = torch.where(parallel[:, None, None], self.mask, x) + self.positions[:length]
        x = x.to(compute_dtype(x))
        earlier = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = earlier | parallel[:, None, None, None]  # [B, 1, T, T]
        for block in self.blocks:
            x = block(x, patches.to(x.dtype), mask)
        return self.head(self.norm(x), targets)
