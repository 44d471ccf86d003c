"""I-JEPA with the modules of lightly: predictor, masks and momentum (arXiv 2301.08243)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import IJEPAPredictorTIMM
from torch import Tensor

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.ijepa import IJEPA, Config


class LightlyIJEPA(Objective):
    averaged = {"backbone": "target"}
    views = staticmethod(IJEPA.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)
        self.target = copy.deepcopy(self.backbone)
        utils.deactivate_requires_grad(self.target)
        patches = (self.backbone.image_size // self.backbone.patch_size) ** 2
        self.predictor = IJEPAPredictorTIMM(
            patches, cfg.predictor_depth, self.backbone.embed_dim, cfg.predictor_dim, cfg.predictor_heads
        )

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        context, blocks = [batch["context"]], list(batch["targets"].unbind(1))
        with torch.no_grad():
            features = self.target(batch["image"]).tokens
            target = utils.apply_masks(F.layer_norm(features, features.shape[-1:]), blocks)
        predicted = self.predictor(self.backbone(batch["image"], keep=batch["context"]).tokens, context, blocks)
        distance = F.smooth_l1_loss if self.cfg.loss == "smooth_l1" else F.mse_loss
        return distance(predicted, target), {}

    def after_step(self, step: int) -> None:
        utils.update_momentum(self.backbone, self.target, self.cfg.momentum(step))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.target, "mean")}
