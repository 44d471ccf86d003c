"""DINOv2 with the modules of lightly: heads, the losses of DINO, iBOT and KoLeo, momentum (arXiv 2304.07193)."""

from __future__ import annotations

import copy
import math

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.dinov2 import PART_OF, Config, DINOv2, head_sizes


class LightlyDINOv2(Objective):
    averaged = {"student": "teacher"}
    couples_batch = True
    part_of = PART_OF
    views = staticmethod(DINOv2.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body, sizes = backbone(mask_token=True), dict(zip(("dino", "ibot"), head_sizes(cfg), strict=True))
        # as in lightly's examples, the heads of the teacher have weights of their own at first
        student, teacher = (
            {name: DINOv2ProjectionHead(body.embed_dim, *widths) for name, widths in sizes.items()} for _ in range(2)
        )
        self.student = nn.ModuleDict({"backbone": body, **student})
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(body), **teacher})
        deactivate_requires_grad(self.teacher)
        self.dino = DINOLoss(sizes["dino"][-1], student_temp=cfg.student_temperature)
        self.ibot = IBOTPatchLoss(sizes["ibot"][-1], student_temp=cfg.student_temperature)
        self.koleo = KoLeoLoss()

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        cfg, temperature = self.cfg, self.cfg.teacher_temperature(step)
        count, crops, small = *batch["global"].shape[:2], batch["local"].shape[1]
        images, mask = (batch[key].transpose(0, 1).flatten(0, 1) for key in ("global", "mask"))  # crop by crop
        with torch.no_grad():
            features = self.teacher["backbone"](images)
            target = self.teacher["dino"](features.cls).split(count)
            patch_target = self.teacher["ibot"](features.tokens[mask])
        features = self.student["backbone"](images, mask=mask)
        cls, patches = features.cls, self.student["ibot"](features.tokens[mask])
        output = [self.student["dino"](cls)]
        if small:
            local = self.student["backbone"](batch["local"].transpose(0, 1).flatten(0, 1)).cls
            output.append(self.student["dino"](local))
        dino = self.dino(target, torch.cat(output).split(count), teacher_temp=temperature)
        side = math.isqrt(mask.shape[1])
        ibot = self.ibot(patch_target, patches, mask.unflatten(1, (side, side)), teacher_temp=temperature)
        koleo = sum(self.koleo(part) for part in cls.chunk(crops))
        return dino + cfg.ibot_weight * ibot + cfg.koleo_weight * koleo, {}

    def after_step(self, step: int) -> None:
        update_momentum(self.student, self.teacher, self.cfg.momentum(step))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher["backbone"])}
