"""Low-rank updates of frozen linear layers (LoRA, arXiv 2106.09685): h = W x + b + (α / r) · U V x, where only U and V
are trained.

Shapes: n inputs, m outputs, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from common.untrusted import is_number

BASE, DOWN, UP = "base", "down", "up"  # names of the sub-modules of `LowRank`


class LowRank(nn.Module):
    """A linear layer with a low-rank update, which is zero at first: U is zero, V is initialised as a linear layer."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base.requires_grad_(False)  # W [m, n], b [m]
        self.down = nn.Linear(base.in_features, rank, bias=False)  # V [r, n]
        self.up = nn.Linear(rank, base.out_features, bias=False)  # U [m, r]
        self.factor = alpha / rank
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] → [..., m]."""
        return self.base(x) + self.up(self.factor * self.down(x))  # the factor on r numbers, not on m


def add_low_rank(network: nn.Module, rank: int, alpha: float, parts: Sequence[str] = ()) -> None:
    """Freeze a network, and give its linear layers a trained update of rank r.

    `parts`: only layers whose dotted name has one of these as whole components get an update: "qkv", "mlp",
    "blocks.2.attn"; empty: all. Raises ValueError if there are no linear layers, or none with one of these names."""
    network.requires_grad_(False)
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise ValueError(f"objective.lora = {rank}: this model has no linear layers; write objective.lora=null")
    for part in parts:
        if not any(_is_part(part, name) for name in layers):
            known = sorted({component for name in layers for component in name.split(".") if not is_number(component)})
            raise ValueError(
                f"objective.lora_layers = {[*parts]}: no linear layer has {part} in its name; write some of"
                f" {', '.join(known)}"
            )
    for name, layer in layers.items():
        if not parts or any(_is_part(part, name) for part in parts):
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, LowRank(layer, rank, alpha))


def _is_part(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def merge_low_rank(state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state dict of the network without updates that computes the same: W + (α / r) · U V in place of W, and the
    names that `add_low_rank` has found."""
    layers = [key.removesuffix(f".{BASE}.weight") for key in state if key.endswith(f".{BASE}.weight")]
    out = dict(state)
    for layer in layers:
        down, up = (out.pop(f"{layer}.{name}.weight") for name in (DOWN, UP))
        weight = out.pop(f"{layer}.{BASE}.weight")
        out[f"{layer}.weight"] = weight + alpha / len(down) * (up @ down).to(weight.dtype)
        if f"{layer}.{BASE}.bias" in out:
            out[f"{layer}.bias"] = out.pop(f"{layer}.{BASE}.bias")
    return out
