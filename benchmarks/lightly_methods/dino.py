"""DINO with the modules of lightly: heads, centred loss and momentum (arXiv 2104.14294)."""

from __future__ import annotations

import copy

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.dino import DINO, PART_OF, Config


class LightlyDINO(Objective):
    averaged = {"student": "teacher"}
    part_of = PART_OF
    views = staticmethod(DINO.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone()
        # as in lightly's examples, the head of the teacher has weights of its own at first
        student, teacher = (
            DINOProjectionHead(
                body.embed_dim,
                cfg.head_hidden,
                cfg.head_bottleneck,
                cfg.prototypes,
                norm_last_layer=cfg.unit_prototypes,
            )
            for _ in range(2)
        )
        self.student = nn.ModuleDict({"backbone": body, "head": student})
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(body), "head": teacher})
        deactivate_requires_grad(self.teacher)
        self.criterion = DINOLoss(
            cfg.prototypes, student_temp=cfg.student_temperature, center_momentum=cfg.center_momentum
        )

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        large, small = (batch[size].unbind(1) for size in ("global", "local"))
        with torch.no_grad():
            targets = [self.teacher["head"](self.teacher["backbone"](view).cls) for view in large]
        outputs = [self.student["head"](self.student["backbone"](view).cls) for view in (*large, *small)]
        return self.criterion(targets, outputs, teacher_temp=self.cfg.teacher_temperature(step)), {}

    def after_step(self, step: int) -> None:
        update_momentum(self.student, self.teacher, self.cfg.momentum(step))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher["backbone"])}
