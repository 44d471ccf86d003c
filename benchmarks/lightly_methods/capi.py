"""CAPI with the modules of lightly: predictor, heads, loss and momentum (arXiv 2502.08769)."""

from __future__ import annotations

import copy

import torch
from lightly.loss import CAPILoss
from lightly.models.modules import CAPIPredictorTIMM, CAPIProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.capi import CAPI, Config


class LightlyCAPI(Objective):
    averaged = {"backbone": "teacher"}
    couples_batch = True
    least_batch = 2
    lr_scales = {"teacher_head": 0.5}
    views = staticmethod(CAPI.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)
        self.teacher = copy.deepcopy(self.backbone)
        deactivate_requires_grad(self.teacher)
        width, side = self.backbone.embed_dim, self.backbone.image_size // self.backbone.patch_size
        self.predictor = CAPIPredictorTIMM(width, side, cfg.predictor_depth, cfg.predictor_heads)
        self.student_head = CAPIProjectionHead(width, cfg.cluster_count, weight_norm=True)
        self.teacher_head = CAPIProjectionHead(width, cfg.cluster_count, bias=True)
        self.criterion = CAPILoss(cfg.teacher_temperature, cfg.student_temperature)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, visible, places = batch["image"], batch["visible"], batch["predicted"]
        with torch.no_grad():
            tokens = self.teacher(images).tokens
        targets = self.teacher_head(tokens)  # trained by the second loss
        predicted = self.predictor(self.backbone(images, keep=visible).tokens, visible, places)
        loss = self.criterion(targets, self.student_head(predicted), teacher_index=places)
        return loss + self.criterion(targets, targets), {}

    def after_step(self, step: int) -> None:
        update_momentum(self.backbone, self.teacher, self.cfg.momentum(step))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher, "mean")}
