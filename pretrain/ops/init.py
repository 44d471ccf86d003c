"""Initial weights."""

from __future__ import annotations

from torch import nn


def trunc_normal(linear: nn.Module) -> None:
    """Weights from a normal distribution of std 0.02, truncated at ±2; biases zero: the initialisation of ViT, MAE and
    DINO."""
    if isinstance(linear, nn.Linear):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
