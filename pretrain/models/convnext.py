"""ConvNeXt (arXiv 2201.03545) as DINOv3 distils it (2508.10104): `cls` is the pooled last feature map, `tokens` are its
cells, and both have the same norm.

Parameters have the names of the official files. Shapes: B images, C channels of a stage, N = h·w cells and D channels
of the last feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.families import ConvNeXt
from pretrain.models.layers import Backbone, Features, LayerNorm
from pretrain.ops.init import trunc_normal


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """x + gamma · MLP(norm(depthwise 7×7 x)) on [B, C, h, w]; with drop path, for a random subset of the images, scaled
    up."""

    def __init__(self, dim: int, layer_scale: float | None, drop_path: float, eps: float):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm(dim, eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale is not None else None
        self.drop_rate = drop_path

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_rate == 0:
            return x + self._branch(x)
        count = max(int(len(x) * (1 - self.drop_rate)), 1)
        images = torch.randperm(len(x), device=x.device)[:count]
        return x.index_add(0, images, (self._branch(x[images]) * (len(x) / count)).to(x.dtype))

    def _branch(self, x: Tensor) -> Tensor:
        x = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # [B, h, w, C]
        x = self.pwconv2(F.gelu(self.pwconv1(x)))
        return (x if self.gamma is None else x * self.gamma.to(x.dtype)).permute(0, 3, 1, 2)


class ConvolutionalNetwork(Backbone):
    convolutional = True

    def __init__(self, cfg: ConvNeXt):
        super().__init__()
        if len(cfg.widths) != len(cfg.depths):
            raise ValueError(f"model.widths {cfg.widths} and model.depths {cfg.depths} must be of one length")
        if not 0 <= float(cfg.drop_path) < 1:
            raise ValueError(f"model.drop_path = {cfg.drop_path}: must be at least 0 and below 1")
        self.cfg = cfg
        self.embed_dim, self.image_size = cfg.widths[-1], cfg.image_size
        self.patch_size = 4 * 2 ** (len(cfg.widths) - 1)
        stem = nn.Sequential(
            nn.Conv2d(cfg.in_channels, cfg.widths[0], 4, stride=4), ChannelNorm(cfg.widths[0], cfg.norm_eps)
        )
        downsample = [stem]
        for narrow, wide in zip(cfg.widths[:-1], cfg.widths[1:], strict=True):
            downsample.append(nn.Sequential(ChannelNorm(narrow, cfg.norm_eps), nn.Conv2d(narrow, wide, 2, stride=2)))
        self.downsample_layers = nn.ModuleList(downsample)
        options = (cfg.layer_scale, cfg.drop_path, cfg.norm_eps)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(width, *options) for _ in range(depth)))
            for width, depth in zip(cfg.widths, cfg.depths, strict=True)
        )
        self.norm = LayerNorm(self.embed_dim, cfg.norm_eps)
        self.apply(trunc_normal)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def shard_units(self) -> list[nn.Module]:
        return [*(block for stage in self.stages for block in stage.children()), self]

    def layer_of(self, name: str) -> tuple[int, int]:
        """Blocks are numbered through all stages; a downsampling layer has the number of the block after it."""
        part, _, rest = name.partition(".")
        depths, last = self.cfg.depths, sum(self.cfg.depths) + 1
        if part == "norm":
            return last, last
        stage, block = (int(n) if n.isdecimal() else 0 for n in rest.split(".")[:2])
        if part == "downsample_layers":
            return (sum(depths[:stage]) + 1 if stage else 0), last
        return sum(depths[:stage]) + block + 1, last

    def forward(self, x: Tensor | list[Tensor], *, mask=None, keep=None, layers: int = 1):
        """See `Backbone`; a convolutional network takes no mask, drops no patches, and has one layer of features."""
        if isinstance(x, list):
            if any(m is not None for m in [*(mask or []), *(keep or [])]):
                raise ValueError(
                    "a ConvNeXt takes no mask and no keep; choose a ViT (model=vit_small) for this objective"
                )
            return [self.forward(one, layers=layers) for one in x]
        if mask is not None or keep is not None or layers != 1:
            raise ValueError(
                "a ConvNeXt takes no mask, no keep and layers=1 only; choose a ViT (model=vit_small) for this objective"
            )
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"an input of {x.shape[-2]}×{x.shape[-1]} pixels is less than one cell of {self.patch_size} pixels"
            )
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        cells = x.flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = self.norm(torch.cat([cells.mean(1, keepdim=True), cells], dim=1))
        return Features(tokens[:, 0], tokens[:, 1:], tokens[:, :0], (x.shape[-2], x.shape[-1]))
