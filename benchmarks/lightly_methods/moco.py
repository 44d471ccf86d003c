"""MoCo v2 with the modules of lightly: head, memory bank, NT-Xent loss and momentum (arXiv 2003.04297)."""

from __future__ import annotations

import copy

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.moco import Config, MoCo


class LightlyMoCo(Objective):
    averaged = {"query": "key"}
    views = staticmethod(MoCo.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone(local_cls_norm=False)
        head = MoCoProjectionHead(body.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.query = nn.ModuleDict({"backbone": body, "head": head})
        self.key = copy.deepcopy(self.query)
        deactivate_requires_grad(self.key)
        self.criterion = NTXentLoss(cfg.temperature, memory_bank_size=(cfg.queue_size, cfg.head_outputs))

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch["image"].unbind(1)
        query = self.query["head"](self.query["backbone"](first).cls)
        with torch.no_grad():
            key = self.key["head"](self.key["backbone"](second).cls)
        return self.criterion(query, key), {}

    def after_step(self, step: int) -> None:
        update_momentum(self.query, self.key, self.cfg.momentum(step))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.query["backbone"])}
