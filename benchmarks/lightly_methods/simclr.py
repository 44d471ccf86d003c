"""SimCLR with the modules of lightly: its projection head and its NT-Xent loss (arXiv 2002.05709)."""

from __future__ import annotations

from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.simclr import Config, SimCLR


class LightlySimCLR(Objective):
    couples_batch = True
    least_batch = 2
    views = staticmethod(SimCLR.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)
        self.head = SimCLRProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.criterion = NTXentLoss(cfg.temperature)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (self.head(self.backbone(view).cls) for view in batch["image"].unbind(1))
        return self.criterion(first, second), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
