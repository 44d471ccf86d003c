"""Heads between backbone features and a loss."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops.cross_entropy import cross_entropy
from pretrain.ops.init import trunc_normal
from pretrain.ops.sync_norm import BatchNorm

Lengths = Literal["unit", "weight_norm", "unnormalised"]  # of prototypes, see `PrototypeHead`


class ProjectionHead(nn.Sequential):
    """SimCLR's g(·): linear, batch norm, ReLU, linear (arXiv 2002.05709 §2; batch norm as in its published models)."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__(
            nn.Linear(inputs, hidden, bias=False), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )


class MLPHead(nn.Sequential):
    """Linear layers of the given widths without biases, with batch norm and ReLU between them: the projectors and
    predictors of BYOL, SwAV, Barlow Twins, VICReg, MoCo v3 and LeJEPA.

    The published hidden layers of SwAV and VICReg have biases, which have no effect before a batch norm. SwAV's last
    layer has one, too, which is left out here.
    `last_norm`: the outputs pass a batch norm without parameters, as in MoCo v3 (arXiv 2104.02057).
    """

    def __init__(self, *widths: int, last_norm: bool = False):
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 2):
            layers.append(nn.Linear(inputs, outputs, bias=False))
            layers += [BatchNorm(outputs), nn.ReLU()] if number < len(widths) else []
        super().__init__(*layers, *([BatchNorm(widths[-1], affine=False)] if last_norm else []))


def head_sizes(cfg: Any) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(hidden, bottleneck, prototypes) of the DINO head and of the iBOT head. Options of the iBOT head that are null
    have the values of the DINO head."""
    dino = (cfg.head_hidden, cfg.head_bottleneck, cfg.prototypes)
    return dino, (cfg.ibot_hidden or dino[0], cfg.ibot_bottleneck or dino[1], cfg.ibot_prototypes or dino[2])


class Prototypes(nn.Module):
    """The cosines of x [..., D] with K prototypes (SwAV, arXiv 2006.09882, §3.1), which are unit vectors at first."""

    last_layer = "prototypes"  # the parameter that `optim.freeze_last_layer` freezes

    def __init__(self, inputs: int, prototypes: int):
        super().__init__()
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, inputs), dim=-1))

    def forward(
        self, x: Tensor, targets: Tensor | None = None, temperature: float = 1.0, row_weights: Tensor | None = None
    ) -> Tensor:
        """As `PrototypeHead`."""
        x, prototypes = F.normalize(x, dim=-1, eps=1e-6), F.normalize(self.prototypes, dim=-1)
        return scores(x, prototypes, targets, temperature, row_weights)


class PrototypeHead(nn.Module):
    """DINO's head (arXiv 2104.14294): three linear layers with GELU to a bottleneck, L2 normalisation, and products
    with K prototypes.

    `lengths` of the prototypes: "unit": they are normalised, so that logits are cosines in [-1, 1]; "weight_norm": they
    are normalised and multiplied by trained lengths, which are 1 at first (1602.07868), as in DINOv2 (2304.07193);
    "unnormalised": as in DINOv3 (2508.10104).

    `batch_norms`: a batch norm follows each hidden layer, which is an option of DINO's published code, and one without
    parameters follows the bottleneck. At first, the class tokens of different images are nearly parallel; without the
    norms, so are the outputs.
    """

    last_layer = ("prototypes", "lengths")  # the parameters that `optim.freeze_last_layer` freezes

    def __init__(
        self,
        inputs: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        lengths: Lengths = "unit",
        batch_norms: bool = False,
    ):
        super().__init__()
        self.normalised = lengths != "unnormalised"
        layers: list[nn.Module] = []
        for width, outputs in ((inputs, hidden), (hidden, hidden)):
            layers += [nn.Linear(width, outputs), *([BatchNorm(outputs)] if batch_norms else []), nn.GELU()]
        last = [BatchNorm(bottleneck, affine=False)] if batch_norms else []
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck), *last)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.lengths = nn.Parameter(torch.ones(prototypes, 1)) if lengths == "weight_norm" else None
        self.apply(trunc_normal)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(
        self, x: Tensor, targets: Tensor | None = None, temperature: float = 1.0, row_weights: Tensor | None = None
    ) -> Tensor:
        """Logits [..., K] of x [..., D]. With targets [R / n, K]: the sum of the cross-entropies of the rows x [R, D]
        at `temperature`, where target row i serves the n consecutive rows of x from i·n on. In this case the logits are
        never all in memory at the same time (`pretrain.ops.cross_entropy`).
        """
        x = F.normalize(self.mlp(x), dim=-1, eps=1e-6)
        prototypes = F.normalize(self.prototypes, dim=-1) if self.normalised else self.prototypes
        prototypes = prototypes if self.lengths is None else self.lengths * prototypes
        return scores(x, prototypes, targets, temperature, row_weights)


def scores(
    x: Tensor, prototypes: Tensor, targets: Tensor | None, temperature: float, row_weights: Tensor | None
) -> Tensor:
    """The products [..., K] of x [..., D] with prototypes [K, D], or the sum of the cross-entropies with `targets`."""
    if targets is not None:
        return cross_entropy(x, prototypes, targets, row_weights=row_weights, scale=1 / temperature)
    return F.linear(x, prototypes.to(x.dtype))
