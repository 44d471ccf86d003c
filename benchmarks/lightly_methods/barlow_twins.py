"""Barlow Twins with the modules of lightly: its projection head and its loss (arXiv 2103.03230)."""

from __future__ import annotations

from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from torch import Tensor

from pretrain.objectives.barlow_twins import BarlowTwins, Config
from pretrain.objectives.base import Batch, Builder, Exported, Objective


class LightlyBarlowTwins(Objective):
    couples_batch = True
    least_batch = 2
    views = staticmethod(BarlowTwins.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)
        self.head = BarlowTwinsProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.criterion = BarlowTwinsLoss(cfg.off_diagonal_weight)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.head(self.backbone(view).cls) for view in batch["image"].unbind(1))
        return self.cfg.loss_factor * self.criterion(first, second), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
