"""SimMIM with the modules of lightly, which has its targets, but no head of its own (arXiv 2111.09886)."""

from __future__ import annotations

import torch.nn.functional as F
from lightly.models import utils
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.simmim import Config, SimMIM


class LightlySimMIM(Objective):
    views = staticmethod(SimMIM.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(mask_token=True, local_cls_norm=False)
        self.decoder = nn.Linear(self.backbone.embed_dim, self.backbone.patch_size**2 * 3)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        patches = utils.patchify(batch["image"], self.backbone.patch_size)
        mask = patches.new_zeros(patches.shape[:2]).scatter(1, batch["masked"], 1).bool()
        tokens = self.backbone(batch["image"], mask=mask).tokens
        predicted = self.decoder(utils.get_at_index(tokens, batch["masked"]))
        return F.l1_loss(predicted, utils.get_at_index(patches, batch["masked"])), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}
