"""DINOv2: a student predicts its moving average's prototype assignments of crops and masked patches (arXiv 2304.07193).

    teacher: 2 global crops, not masked → Sinkhorn over prototypes
    student: the same crops with block masks, and n local crops
    L_dino = mean over (student crop, other teacher crop) of −Σ p_t log p_s on class tokens        (DINO, 2104.14294)
    L_ibot = the same on masked patches, averaged per image, over all global crops                  (iBOT, 2111.07832)
    loss   = L_dino + L_ibot + 0.1 · (KoLeo of the class tokens, summed over the two global crops)
    after each step: teacher ← m·teacher + (1 − m)·student

Shapes: B images, G = 2 global and L local crops each, N patches of a global crop, M masked patches in the batch,
D width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import option
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.multicrop import PART_OF, multicrop
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import PrototypeHeads, momentum, sinkhorn_temperature
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import Lengths, PrototypeHead, head_sizes
from pretrain.ops.koleo import koleo
from pretrain.ops.self_distillation import by_image, dino_terms, health, ibot_term, select_patches
from pretrain.ops.sinkhorn import sinkhorn


@dataclass
class Config(PrototypeHeads):
    teacher_temperature: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.07, start=0.04, warmup=0.3), above=0, auto=sinkhorn_temperature
    )
    momentum: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.992, kind="cosine", final=1.0), low=0, high=1, auto=momentum
    )
    # whether the prototypes have trained lengths, which are 1 at first, as published; false: their length is 1
    trained_lengths: bool = False

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{**super().tiny()[0], "objective.trained_lengths": True}]


class DINOv2(Objective):
    kept_in_eval = ("teacher",)  # no drop path, and positions without jitter
    averaged = {"student": "teacher"}
    couples_batch = True
    part_of = PART_OF
    encoder_name = "teacher.backbone"

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body, (dino, ibot) = backbone(mask_token=True), head_sizes(cfg)
        lengths: Lengths = "weight_norm" if cfg.trained_lengths else "unit"
        heads = {
            "dino_head": PrototypeHead(body.embed_dim, *dino, lengths, cfg.head_norms),
            "ibot_head": PrototypeHead(body.embed_dim, *ibot, lengths, cfg.head_norms),
        }
        self.student = nn.ModuleDict({"backbone": body, **heads})
        self.teacher = make_teacher(self.student, batch_statistics=True).eval()

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return multicrop(cfg, about.image_size, about.patch_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        cfg, crops = self.cfg, batch["global"].shape[1]
        images, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)  # [B·G, ...]
        p_cls, p_patch = self.targets(images, batch["mask_indices"], cfg.teacher_temperature(step))

        inputs, masks = [images], list[Tensor | None]([mask])
        if batch["local"].shape[1]:
            inputs, masks = [images, batch["local"].flatten(0, 1)], [mask, None]
        features = self.student["backbone"](inputs, mask=masks)
        cls, local_cls = by_image([f.cls for f in features], crops)  # [B, G, D], [B, L, D]
        dino_head, ibot_head = self.student["dino_head"], self.student["ibot_head"]
        local_loss, global_loss = dino_terms(
            dino_head, cls, local_cls, p_cls.unflatten(0, (-1, crops)), cfg.student_temperature
        )
        patches, weight = select_patches(features[0].tokens, batch["mask_indices"]), batch["mask_weight"]  # [M, D], [M]
        ibot = ibot_term(ibot_head, patches, p_patch, weight, len(images), cfg.student_temperature)
        koleo_loss = sum(koleo(cls[:, i], cfg.koleo_group) for i in range(crops))
        loss = local_loss + global_loss + cfg.ibot_weight * ibot + cfg.koleo_weight * koleo_loss
        logs = {"dino_local": local_loss, "dino_global": global_loss, "ibot": ibot, "koleo": koleo_loss / crops}
        logs |= health(cls[:, 0], p_cls)
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def targets(self, images: Tensor, masked: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's assignments of class tokens [B·G, K] and of masked patches [M, K].

        `images`: global crops [B·G, 3, H, W]; `masked`: indices of the masked patches among all B·G·N patches, [M].
        """
        features = self.teacher["backbone"](images)
        p_cls = sinkhorn(self.teacher["dino_head"](features.cls), temperature)
        return p_cls, sinkhorn(self.teacher["ibot_head"](select_patches(features.tokens, masked)), temperature)

    def after_step(self, step: int) -> None:
        ema_update(self.teacher, self.student, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher["backbone"])}
