"""VICReg with the modules of lightly: its projection head and its loss (arXiv 2105.04906)."""

from __future__ import annotations

from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.vicreg import Config, VICReg


class LightlyVICReg(Objective):
    couples_batch = True
    least_batch = 2
    views = staticmethod(VICReg.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)
        self.head = VICRegProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.criterion = VICRegLoss(cfg.invariance_weight, cfg.variance_weight, cfg.covariance_weight)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.head(self.backbone(view).cls) for view in batch["image"].unbind(1))
        return self.criterion(first, second), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
