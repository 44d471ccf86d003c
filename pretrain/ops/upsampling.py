"""Convolutional decoders from a map of features to an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from pretrain.ops.sync_norm import BatchNorm


def doublings(factor: int, key: str) -> int:
    """n, where `factor` = 2ⁿ and n is at least 1. Raises ValueError for another factor; `key`: its name in a recipe."""
    count = factor.bit_length() - 1
    if factor < 2 or factor != 2**count:
        near = f"{2**count} or {2 ** (count + 1)}" if factor > 2 else "2"
        raise ValueError(f"{key} = {factor}: the decoder doubles maps; write {near}")
    return count


def upsampling(widths: Sequence[int], norm: bool) -> nn.Sequential:
    """[B, widths[0], h, w] → [B, widths[-1], h · 2ⁿ, w · 2ⁿ] by n transposed 4×4 convolutions of stride 2, as in DCGAN
    (arXiv 1511.06434), with ReLU and, if `norm`, batch norm between them."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 2):
        last = number == len(widths)
        layers.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=last or not norm))
        if not last:
            layers += [BatchNorm(outputs), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers)
