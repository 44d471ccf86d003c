"""LeJEPA: views predict the mean of global views, and their embeddings become normally distributed (arXiv 2511.08544).

    z_v = g(f(view v)),  μ = mean of z over the global views
    prediction = mean over images, views and features of (z_v − μ)²
    SIGReg = mean over views and random unit directions a of T(aᵀ z_v)
    T(x) = N ∫ |φ(t) − exp(−t²/2)|² exp(−t²/2) dt,   φ(t) = Σ_n exp(i t x_n) / N             (Epps-Pulley's statistic)
    loss = (1 − λ) · prediction + λ · SIGReg

The integral is a trapezoidal sum over `knots` points of [0, 3], doubled, as its integrand is even. φ is that of the
global batch, by one all-reduce, and the directions of a step are the same on all ranks. There is no teacher, no stopped
gradient and no schedule.

Shapes: B images of this rank, N of all ranks, G = 2 global and L local views each, V = G + L, P outputs, M directions,
K knots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.multicrop import PART_OF, unmasked_crops
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import Crops
from pretrain.ops.gather import all_reduce, world
from pretrain.ops.heads import MLPHead
from pretrain.ops.host_to_device import to_device
from pretrain.ops.precision import wide
from pretrain.ops.self_distillation import by_image, health

LAST_KNOT = 3.0  # the weight exp(−t²/2) is 0.011 there


@dataclass
class Config(Crops):
    remedies = {name: "raise objective.normality_weight" for name in ("feature_std", "rank")}

    normality_weight: float = option(0.05, low=0, high=1)  # λ: of SIGReg; the prediction has 1 − λ
    head_hidden: int = option(2048, low=1)  # width of the two hidden layers of the projector
    head_outputs: int = option(64, low=1)  # P, the width of the embeddings that are compared
    directions: int = option(1024, low=1)  # M, the random directions of a step
    knots: int = option(17, low=2)  # K, the points of the integral
    global_scale: float = option(0.3, above=0, high=1)  # smallest share of the image's area in a global crop
    local_crops: int = option(6, low=0)  # local crops of each image, in addition to two global ones
    # probability of a blur in the first global crop, the second one, and local crops
    blur: list[float] = option(lambda: [0.5, 0.5, 0.5], low=0, high=1)

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        heads = {"objective.head_hidden": 64, "objective.head_outputs": 16, "objective.directions": 64}
        return [{**heads, "objective.local_size": 16, "objective.local_crops": 2}]


class LeJEPA(Objective):
    couples_batch = True
    least_batch = 2
    part_of = PART_OF

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.head = MLPHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_hidden, cfg.head_outputs)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return unmasked_crops(cfg, about.image_size, about.patch_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        weight, crops = self.cfg.normality_weight, batch["global"].shape[1]
        sizes = [batch["global"], *([batch["local"]] if batch["local"].shape[1] else [])]
        cls = [f.cls for f in self.backbone([views.flatten(0, 1) for views in sizes])]
        out = self.head(torch.cat(cls))  # [B·V, P]
        out = wide(out)
        z = torch.cat(by_image(list(out.split([len(x) for x in cls])), crops), dim=1)  # [B, V, P]
        center = z[:, :crops].mean(1, keepdim=True)
        prediction = (z - center).square().mean()
        normality = sigreg(z.transpose(0, 1), self.directions(step, z), self.cfg.knots)
        logs = {"prediction": prediction.detach(), "normality": normality.detach()}
        return (1 - weight) * prediction + weight * normality, logs | health(cls[0].detach()[::crops])

    def directions(self, step: int, z: Tensor) -> Tensor:
        """The unit directions [P, M] of a step: the same on all ranks and in a resumed run."""
        draw = torch.Generator().manual_seed(step)
        directions = torch.randn(z.shape[-1], self.cfg.directions, generator=draw)
        return F.normalize(to_device(directions, z.device).to(z.dtype), dim=0)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}


def sigreg(z: Tensor, directions: Tensor, knots: int) -> Tensor:
    """The mean of T over views and directions [P, M], for embeddings z [V, B, P] of this rank's images.

    T grows with the number of images in the global batch, as published. Collective: every rank must call it.
    """
    count = z.shape[1] * world()[1]
    t = torch.linspace(0, LAST_KNOT, knots, device=z.device, dtype=z.dtype)  # [K]
    normal = (-t.square() / 2).exp()  # φ of a normal distribution, and the weight of the integral
    with torch.autocast(z.device.type, enabled=False):
        angles = (z @ directions).unsqueeze(-1) * t  # [V, B, M, K]
        real, imaginary = all_reduce(torch.stack([angles.cos().sum(1), angles.sin().sum(1)])) / count  # [V, M, K]
        distance = (real - normal).square() + imaginary.square()
        half = torch.trapezoid(distance * normal, dx=LAST_KNOT / (knots - 1))  # [V, M]
        return count * 2 * half.mean()
