"""Initial weights."""

from __future__ import annotations

from torch import nn


def trunc_normal(linear: nn.Module) -> None:
    """Initialise a linear layer as ViT, MAE and DINO do: weights are normal with std 0.02, truncated at ±2, and biases
    are zero. Other modules are not changed."""
    if isinstance(linear, nn.Linear):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
