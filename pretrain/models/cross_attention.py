"""A transformer block with cross-attention, for predictors whose queries see the output of an encoder and not each
other.

Shapes: B images, P queries, C tokens of the context, E width of a query, D width of the context, H heads, d = E / H.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import LayerNorm, Mlp, Rotary, Rotation


class CrossBlock(nn.Module):
    """Pre-norm block whose tokens [B, P, E] see the context [B, C, D] by cross-attention, and not each other."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(dim, 1e-6), LayerNorm(dim, 1e-6)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(context_dim, 2 * dim)
        self.rotary = Rotary()
        self.proj, self.mlp = nn.Linear(dim, dim), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor, queries: Rotation, keys: Rotation) -> Tensor:
        """`queries` and `keys`: cos and sin of the places of x [B, P, 1, d/2] and of the context [B, C, 1, d/2]."""
        q = self.query(self.norm1(x)).unflatten(2, (self.heads, -1))  # [B, P, H, d]
        k, v = self.key_value(context).unflatten(2, (2, self.heads, -1)).unbind(2)  # [B, C, H, d]
        q, k = self.rotary.turned(q, *queries), self.rotary.turned(k, *keys)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
