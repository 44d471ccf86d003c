"""Residual network (arXiv 1512.03385; zero-initialised last norms, 1706.02677): `cls` is the pooled last map, `tokens`
its cells."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.families import ResNet
from pretrain.models.layers import Backbone, Features
from pretrain.ops.sync_norm import BatchNorm


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, BatchNorm(outputs))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions (basic), or 1×1, 3×3 and 1×1 convolutions with a quarter of the width inside (bottleneck,
    with the stride in the 3×3 convolution)."""

    def __init__(self, inputs: int, outputs: int, stride: int, bottleneck: bool):
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        widths = (inputs, inner, inner, outputs) if bottleneck else (inputs, inner, outputs)
        layers = [conv_norm(a, b, k, s) for a, b, k, s in zip(widths[:-1], widths[1:], kernels, strides, strict=True)]
        nn.init.zeros_(layers[-1][1].weight)
        self.layers = nn.ModuleList(layers)
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self.layers[:-1]:
            out = F.relu(layer(out))
        return F.relu(self.layers[-1](out) + self.shortcut(x))


class ResidualNetwork(Backbone):
    convolutional = True

    def __init__(self, cfg: ResNet):
        super().__init__()
        if len(cfg.widths) != len(cfg.depths):
            raise ValueError(f"model.widths {cfg.widths} and model.depths {cfg.depths} must be of one length")
        self.cfg = cfg
        expansion = 4 if cfg.block == "bottleneck" else 1
        width = cfg.widths[0]
        if cfg.stem == "small":
            self.stem = nn.Sequential(conv_norm(cfg.in_channels, width, 3), nn.ReLU())
        else:
            self.stem = nn.Sequential(conv_norm(cfg.in_channels, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks = []
        for stage, (outputs, depth) in enumerate(zip(cfg.widths, cfg.depths, strict=True)):
            for i in range(depth):
                blocks.append(
                    ResidualBlock(width, outputs * expansion, 2 if stage and not i else 1, cfg.block == "bottleneck")
                )
                width = outputs * expansion
        self.blocks = nn.ModuleList(blocks)
        self.embed_dim = width
        self.patch_size = (1 if cfg.stem == "small" else 4) * 2 ** (len(cfg.widths) - 1)
        self.image_size = 64 if cfg.stem == "small" else 224

    def forward(self, x: Tensor | list[Tensor], *, mask=None, keep=None, layers: int = 1):
        """See `Backbone`; a convolutional network takes no mask, drops no patches, and has one layer of features."""
        if mask is not None or keep is not None or layers != 1:
            raise ValueError(
                "a ResNet takes no mask, no keep and layers=1 only; choose a ViT (model=vit_small) for this objective"
            )
        if isinstance(x, list):
            return [self.forward(one) for one in x]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, D]
        return Features(tokens.mean(1), tokens, tokens[:, :0], (x.shape[-2], x.shape[-1]))
