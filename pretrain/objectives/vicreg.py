"""VICReg: two views of an image get similar features, which vary and are not correlated (arXiv 2105.04906).

    z, z' = g(f(t(x))), g(f(t'(x)))
    s(z, z') = mean over images and features of (z − z')²                                         (eq. 5)
    v(z) = mean over features j of max(0, 1 − √(Var z_j + ε))                                     (eq. 1)
    c(z) = Σ_{i≠j} Cov(z)_ij² / P                                                                 (eqs. 3 and 4)
    loss = λ s(z, z') + μ (v(z) + v(z')) / 2 + ν (c(z) + c(z'))                                   (eq. 6)

The published code halves the variance terms, as here. Variances and covariances are those of the global batch.

Shapes: B images of this process, two views each, D encoder width, P outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.two_views import two_views
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import TwoViews
from pretrain.ops.batch_moments import centred
from pretrain.ops.gather import products_over_batch
from pretrain.ops.heads import MLPHead
from pretrain.ops.precision import wide
from pretrain.ops.self_distillation import health


@dataclass
class Config(TwoViews):
    head_hidden: int = option(8192, low=1)  # width of the two hidden layers of the expander
    head_outputs: int = option(8192, low=2)  # P, the number of features in the loss
    invariance_weight: float = option(25.0, low=0)  # λ: of the distance between the views
    variance_weight: float = option(25.0, low=0)  # μ: of features whose standard deviation is below 1
    covariance_weight: float = option(1.0, low=0)  # ν: of covariances between different features

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.head_hidden": 64, "objective.head_outputs": 32}]


class VICReg(Objective):
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
        cfg = self.cfg
        features = [f.cls for f in self.backbone(list(batch["image"].unbind(1)))]  # two of [B, D]
        a, b = (wide(self.head(x)) for x in features)  # [B, P]
        invariance = F.mse_loss(a, b)
        (variance_a, covariance_a), (variance_b, covariance_b) = regularisers(a), regularisers(b)
        variance, covariance = (variance_a + variance_b) / 2, covariance_a + covariance_b
        loss = cfg.invariance_weight * invariance + cfg.variance_weight * variance + cfg.covariance_weight * covariance
        logs = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return loss, {name: value.detach() for name, value in logs.items()} | health(features[0].detach())

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}


def regularisers(z: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """(v(z), c(z)) of this rank's embeddings z [B, P] of one view, over the global batch; variances are unbiased.

    Collective: every rank must call it.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, variance, count = centred(z)
        deviation = (variance * (count / (count - 1)) + eps).sqrt()  # [P]
        covariance = products_over_batch(z, z) / (count - 1)  # [P, P]
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        return F.relu(1 - deviation).mean(), off_diagonal / z.shape[1]
