"""Conformer (arXiv 2005.08100) on log-mel features, in the form of w2v-BERT 2.0 (2312.05187): groups of frames are
projected to tokens, attention has learned relative positions (1803.02155), and convolutions see earlier tokens only.

transformers' `Wav2Vec2BertModel` is the same network. Shapes: B recordings of T frames with M mel bands, U tokens, D
features, H heads of width d, R relative positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.views.log_mel import stacked
from pretrain.models.families import Conformer
from pretrain.models.layers import Backbone, Features, LayerNorm, compute_dtype
from pretrain.models.text_layers import initialise
from pretrain.models.text_mlp import FusedLinear


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int):
        super().__init__()
        self.up = nn.Linear(dim, width)
        self.down = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class RelativeAttention(nn.Module):
    """softmax((q kᵀ + q rᵀ) / √d) v, where r is a learned vector for the distance of the two tokens, clipped to
    −left … right: [B, U, D] → [B, U, D]."""

    def __init__(self, dim: int, heads: int, left: int, right: int):
        super().__init__()
        self.heads, self.left, self.right = heads, left, right
        self.qkv = FusedLinear(dim, (dim, dim, dim), bias=True)
        self.distances = nn.Embedding(left + 1 + right, dim // heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """valid: bool [B, U], false for padding, to which no token attends."""
        b, u, _ = x.shape
        q, k, v = self.qkv(x).view(b, u, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, U, d]
        places = torch.arange(u, device=x.device)
        distance = (places - places.unsqueeze(1)).clamp(-self.left, self.right) + self.left  # [U, U]
        table = self.distances(torch.arange(self.left + 1 + self.right, device=x.device)).to(q.dtype)  # [R, d]
        scores = q @ table.t() * q.shape[-1] ** -0.5  # [B, H, U, R]
        bias = scores.gather(-1, distance.expand(b, self.heads, u, u))  # [B, H, U, U]
        if valid is not None:
            bias = bias.masked_fill(~valid[:, None, None], torch.finfo(bias.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Gated pointwise convolution, depthwise convolution over the last `kernel` tokens, pointwise convolution:
    [B, U, D] → [B, U, D]. Padding follows a recording, so no token of it sees padding."""

    def __init__(self, dim: int, kernel: int, eps: float):
        super().__init__()
        self.kernel = kernel
        self.gate = nn.Linear(dim, 2 * dim, bias=False)
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim, bias=False)
        self.norm = LayerNorm(dim, eps)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.gate(x)).transpose(1, 2)  # [B, D, U]
        x = self.depthwise(F.pad(x, (self.kernel - 1, 0))).transpose(1, 2)
        return self.proj(F.silu(self.norm(x)))


class ConformerBlock(nn.Module):
    """x + ½ FFN, + attention, + convolution, + ½ FFN, norm (arXiv 2005.08100, eq. 1): [B, U, D] → [B, U, D]."""

    def __init__(self, cfg: Conformer):
        super().__init__()
        dim, eps = cfg.dim, cfg.norm_eps
        width = 4 * dim if cfg.mlp_width == "auto" else cfg.mlp_width
        self.norm1 = LayerNorm(dim, eps)
        self.ffn1 = FeedForward(dim, width)
        self.norm2 = LayerNorm(dim, eps)
        self.attn = RelativeAttention(dim, cfg.heads, cfg.left, cfg.right)
        self.norm3 = LayerNorm(dim, eps)
        self.conv = Convolution(dim, cfg.kernel, eps)
        self.norm4 = LayerNorm(dim, eps)
        self.ffn2 = FeedForward(dim, width)
        self.norm5 = LayerNorm(dim, eps)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x + 0.5 * self.ffn1(self.norm1(x))
        x = x + self.attn(self.norm2(x), valid)
        x = x + self.conv(self.norm3(x))
        x = x + 0.5 * self.ffn2(self.norm4(x))
        return self.norm5(x)


class ConformerNetwork(Backbone):
    """forward(x [B, T, M], valid=None, layers=1) -> Features.

    x: log-mel features of `data_pipeline/views/log_mel.py`, or groups of them, [B, U, stack · M]. valid: bool [B, U],
    false for padding, which must follow the recording. `cls` is the mean of the tokens that are no padding.
    """

    def __init__(self, cfg: Conformer):
        super().__init__()
        if cfg.dim % cfg.heads:
            raise ValueError(f"model.dim = {cfg.dim}: must be a multiple of model.heads = {cfg.heads}")
        if cfg.kernel % 2 == 0:
            raise ValueError(f"model.kernel = {cfg.kernel}: must be odd, as transformers' class requires it")
        self.cfg, self.embed_dim = cfg, cfg.dim
        self.embed_norm = LayerNorm(cfg.stack * cfg.mels, cfg.norm_eps)
        self.embed = nn.Linear(cfg.stack * cfg.mels, cfg.dim)
        self.blocks = nn.ModuleList(ConformerBlock(cfg) for _ in range(cfg.depth))
        initialise(self, cfg.depth)

    def about(self) -> dict[str, Any]:
        return {"stack": self.cfg.stack}

    def example(self) -> Tensor:
        """Groups of frames, [2, 16, stack · M]."""
        return torch.randn(2, 16, self.embed.in_features, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor, *, valid: Tensor | None = None, layers: int = 1) -> Features:
        if x.shape[-1] == self.cfg.mels and self.cfg.stack > 1:
            x = stacked(x, self.cfg.stack)  # [B, U, stack · M]
        x, outputs = self.embed(self.embed_norm(x)), []
        x = x.to(compute_dtype(x))
        for i, block in enumerate(self.blocks):
            x = block(x, valid)
            if i >= len(self.blocks) - layers:
                outputs.append(x)
        tokens = torch.cat(outputs, dim=-1) if layers > 1 else x
        if valid is None:
            mean = tokens.mean(1)
        else:
            counted = valid.unsqueeze(-1).to(tokens.dtype)
            mean = (tokens * counted).sum(1) / counted.sum(1).clamp_min(1)
        return Features(mean, tokens, tokens[:, :0], (tokens.shape[1],))
