"""BYOL with the modules of lightly: heads, cosine loss and momentum (arXiv 2006.07733)."""

from __future__ import annotations

import copy

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.byol import BYOL, Config


class LightlyBYOL(Objective):
    averaged = {"online": "target"}
    couples_batch = True
    least_batch = 2
    views = staticmethod(BYOL.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone(local_cls_norm=False)
        projector = BYOLProjectionHead(body.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.online = nn.ModuleDict({"backbone": body, "projector": projector})
        self.predictor = BYOLPredictionHead(cfg.head_outputs, cfg.head_hidden, cfg.head_outputs)
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"].unbind(1)
        p = [self.predictor(self.online["projector"](self.online["backbone"](view).cls)) for view in images]
        with torch.no_grad():
            z = [self.target["projector"](self.target["backbone"](view).cls) for view in images]
        # 4 + 2·(sum of negative cosines) is the loss of the paper; lightly's documentation has a quarter of its gradient
        return 2 * (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])), {}

    def after_step(self, step: int) -> None:
        update_momentum(self.online, self.target, self.cfg.momentum(step))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.online["backbone"])}
