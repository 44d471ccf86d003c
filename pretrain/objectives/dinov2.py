"""DINOv2: a student predicts the prototype assignments of its own moving average, for crops and for masked patches (arXiv 2304.07193).

    teacher: 2 global crops, unmasked → Sinkhorn over prototypes;   student: the same crops with block masks, and n small local crops
    L_dino = mean over (student crop, other teacher crop) of −Σ p_t log p_s on class tokens        (DINO, 2104.14294)
    L_ibot = the same on masked patches, averaged per image, over all global crops                  (iBOT, 2111.07832)
    loss   = L_dino + L_ibot + 0.1 · (KoLeo of the class tokens, summed over the two global crops);   teacher ← m·teacher + (1 − m)·student

Shapes: B images, G = 2 global and L local crops each, N patches of a global crop, M masked patches in the batch, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data_pipeline.multicrop import multicrop
from pretrain.config import Section
from pretrain.objectives.base import Objective
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import PrototypeHead, head_sizes
from pretrain.ops.koleo import koleo
from pretrain.ops.self_distillation import by_image, dino_terms, health, ibot_term
from pretrain.ops.sinkhorn import sinkhorn
from pretrain.schedules import Schedule


@dataclass
class Config(Section):
    prototypes: int | Literal["auto"] = 65536  # auto, here and below: from data, steps and batch (pretrain/auto.py)
    head_hidden: int = 2048
    head_bottleneck: int = 256
    ibot_prototypes: int | None = None  # null: as of the DINO head, as the next two
    ibot_hidden: int | None = None
    ibot_bottleneck: int | None = None
    student_temperature: float = 0.1
    teacher_temperature: Literal["auto"] | Schedule = field(
        default_factory=lambda: Schedule(0.07, start=0.04, warmup=0.3)
    )
    momentum: Literal["auto"] | Schedule = field(default_factory=lambda: Schedule(0.992, kind="cosine", final=1.0))
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int | None = (
        None  # images of the batch in one; null: all of it. The paper's "per GPU" is its batch on each GPU
    )
    local_crops: int = 8
    local_size: int = 96  # pixels
    global_scale: float = 0.32  # smallest share of the image's area in a global crop, and the largest in a local one
    local_scale: float = 0.05
    mask_share: float = 0.5  # of the global crops are masked
    mask_ratio_min: float = 0.1
    mask_ratio_max: float = 0.5
    blur: list[float] = field(
        default_factory=lambda: [1.0, 0.1, 0.5]
    )  # probability for the first, second, local crops; released models: 0, .9, .5
    solarize: float = 0.2  # probability, second global crop only
    flip: float = 0.5  # probability


class DINOv2(Objective):
    couples_batch = True

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        body, (dino, ibot) = backbone(mask_token=True), head_sizes(cfg)
        heads = {"dino_head": PrototypeHead(body.embed_dim, *dino), "ibot_head": PrototypeHead(body.embed_dim, *ibot)}
        self.student = nn.ModuleDict({"backbone": body, **heads})
        self.teacher = make_teacher(self.student).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()  # its inputs are whole, and its positions as they are
        return self

    @staticmethod
    def views(cfg, image_size, patch_size):
        return multicrop(cfg, image_size, patch_size)

    def forward(self, batch, step):
        cfg, crops = self.cfg, batch["global"].shape[1]
        images, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)  # [B·G, ...]
        p_cls, p_patch = self.targets(images, mask, cfg.teacher_temperature(step))

        inputs, masks = [images], [mask]
        if batch["local"].shape[1]:
            inputs, masks = [images, batch["local"].flatten(0, 1)], [mask, None]
        features = self.student["backbone"](inputs, mask=masks)
        cls, small = by_image(features, crops)  # [B, G, D], [B, L, D]
        dino_head, ibot_head = self.student["dino_head"], self.student["ibot_head"]
        local, glob = dino_terms(dino_head, cls, small, p_cls.unflatten(0, (-1, crops)), cfg.student_temperature)
        ibot = ibot_term(ibot_head, features[0].tokens[mask], p_patch, mask, cfg.student_temperature)
        spread = sum(koleo(cls[:, i], cfg.koleo_group) for i in range(crops))
        loss = local + glob + cfg.ibot_weight * ibot + cfg.koleo_weight * spread
        logs = {"dino_local": local, "dino_global": glob, "ibot": ibot, "koleo": spread / crops}
        logs |= health(cls[:, 0], p_cls)
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def targets(self, images: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's assignments for class tokens [B·G, K] and for masked patches [M, K]."""
        features = self.teacher["backbone"](images)
        p_cls = sinkhorn(self.teacher["dino_head"](features.cls), temperature)
        return p_cls, sinkhorn(self.teacher["ibot_head"](features.tokens[mask]), temperature)

    def after_step(self, step):
        ema_update(self.teacher, self.student, self.cfg.momentum(step), self.skipped)

    def encoder(self):
        return self.teacher["backbone"]
