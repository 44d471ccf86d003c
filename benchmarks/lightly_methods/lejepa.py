"""LeJEPA with the modules of lightly: its projection head and its loss with SIGReg (arXiv 2511.08544)."""

from __future__ import annotations

import torch
from lightly.loss import LeJEPALoss
from lightly.models.modules import LeJEPAProjectionHead
from torch import Tensor

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.lejepa import PART_OF, Config, LeJEPA


class LightlyLeJEPA(Objective):
    couples_batch = True
    least_batch = 2
    part_of = PART_OF
    views = staticmethod(LeJEPA.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.head = LeJEPAProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.criterion = LeJEPALoss(cfg.normality_weight, sigreg_knots=cfg.knots, sigreg_num_vectors=cfg.directions)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        large, small = (
            torch.stack([self.head(self.backbone(view).cls) for view in batch[size].unbind(1)])
            for size in ("global", "local")
        )
        return self.criterion(local_proj=small, global_proj=large), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
