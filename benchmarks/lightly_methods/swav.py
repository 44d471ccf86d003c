"""SwAV with the modules of lightly: head, prototypes, memory banks and loss (arXiv 2006.09882)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.swav import GLOBAL, PART_OF, Config, SwAV


class LightlySwAV(Objective):
    couples_batch = True
    least_batch = 2
    part_of = PART_OF
    views = staticmethod(SwAV.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.head = SwaVProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.prototypes = SwaVPrototypes(cfg.head_outputs, cfg.prototypes)
        size = (cfg.queue_size, cfg.head_outputs)
        self.queues = nn.ModuleList(MemoryBankModule(size) for _ in range(GLOBAL if cfg.queue_size else 0))
        self.criterion = SwaVLoss(cfg.temperature, sinkhorn_epsilon=cfg.code_temperature)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.prototypes.normalize()
        large, small = ([self.embedded(view) for view in batch[size].unbind(1)] for size in ("global", "local"))
        with torch.no_grad():
            held = [queue(z.detach(), update=True)[1].T for queue, z in zip(self.queues, large, strict=False)]
            queued = [self.prototypes(rows) for rows in held] if held and step >= self.cfg.queue_start else None
        large, small = ([self.prototypes(z) for z in views] for views in (large, small))
        return self.criterion(large, small, queued).squeeze(), {}

    def embedded(self, view: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(view).cls), dim=1)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
