"""Barlow Twins: the features of two views of an image agree, and no two features carry the same (arXiv 2103.03230).

    z_a, z_b = g(f(t_a(x))), g(f(t_b(x))), each coordinate normalised over the batch to mean 0 and variance 1
    C_ij = Σ_b z_a[b, i] · z_b[b, j] / N                                                          (eq. 2)
    loss = Σ_i (1 − C_ii)² + λ Σ_i Σ_{j≠i} C_ij²                                                  (eq. 1)

C is the cross-correlation over the N images of the global batch, on any number of processes.

Shapes: B images of this process, two views each, D encoder width, P outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.two_views import two_views
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import TwoViews
from pretrain.ops.batch_moments import centred
from pretrain.ops.gather import products_over_batch
from pretrain.ops.heads import MLPHead
from pretrain.ops.self_distillation import health


@dataclass
class Config(TwoViews):
    head_hidden: int = option(8192, low=1)  # width of the two hidden layers of the projector
    head_outputs: int = option(8192, low=2)  # P, the number of features that are decorrelated
    off_diagonal_weight: float = option(0.0051, low=0)  # λ: weight of the correlations between different features
    # factor of the loss. It sets the step of biases and norms under LARS, which does not adapt theirs; published: 0.024
    loss_factor: float = option(1.0, above=0)

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.head_hidden": 64, "objective.head_outputs": 32}]


class BarlowTwins(Objective):
    couples_batch = True
    least_batch = 2  # a single image has no variance

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.head = MLPHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_hidden, cfg.head_outputs)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return two_views(cfg, about.image_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = [f.cls for f in self.backbone(list(batch["image"].unbind(1)))]  # two of [B, D]
        invariance, redundancy = cross_correlation(*map(self.head, features))
        loss = self.cfg.loss_factor * (invariance + self.cfg.off_diagonal_weight * redundancy)
        logs = {"invariance": invariance.detach(), "redundancy": redundancy.detach()}
        return loss, logs | health(features[0].detach())

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}


def cross_correlation(a: Tensor, b: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(Σ_i (1 − C_ii)², Σ_i Σ_{j≠i} C_ij²) of this rank's projections a, b [B, P] of two views, over the global batch.

    `eps` is added to the variances, as the published batch norm does. Collective: every rank must call it.
    """
    with torch.autocast(a.device.type, enabled=False):  # bf16 would round correlations to 1/256
        (a, variance_a, count), (b, variance_b, _) = centred(a), centred(b)
        a, b = a * (variance_a + eps).rsqrt(), b * (variance_b + eps).rsqrt()
        c = products_over_batch(a, b) / count  # [P, P]
        diagonal = c.diagonal()
        return (1 - diagonal).square().sum(), c.square().sum() - diagonal.square().sum()
