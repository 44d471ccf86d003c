"""DINOv2: a student predicts the prototype assignments of its own moving average, for crops and for masked patches (arXiv 2304.07193).

    teacher: 2 global crops, unmasked → Sinkhorn over prototypes;   student: the same crops with block masks, and n small local crops
    L_dino = mean over (student crop, other teacher crop) of −Σ p_t log p_s on class tokens        (DINO, 2104.14294)
    L_ibot = the same on masked patches, averaged per image, over all global crops                  (iBOT, 2111.07832)
    loss   = L_dino + L_ibot + 0.1 · (KoLeo of the class tokens, summed over the two global crops);   teacher ← m·teacher + (1 − m)·student

Shapes: B images, G = 2 global and L local crops each, N patches of a global crop, M masked patches in the batch, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.masks import block_mask, stratified_ratio
from data_pipeline.views import MASKS, Augment, crops
from pretrain.config import Section
from pretrain.objectives.base import Objective
from pretrain.ops.cross_entropy import soft_cross_entropy
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import PrototypeHead
from pretrain.ops.koleo import koleo
from pretrain.ops.sinkhorn import sinkhorn
from pretrain.schedules import Schedule


@dataclass
class Config(Section):
    prototypes: int = 65536
    head_hidden: int = 2048
    head_bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: Schedule = field(default_factory=lambda: Schedule(0.07, start=0.04, warmup=0.3))
    momentum: Schedule = field(default_factory=lambda: Schedule(0.992, kind="cosine", final=1.0))
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
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


class DINOv2(Objective):
    couples_batch = True

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)

        def head(width: int) -> nn.Module:
            return PrototypeHead(width, cfg.head_hidden, cfg.head_bottleneck, cfg.prototypes)

        body = backbone(mask_token=True)
        self.student = nn.ModuleDict(
            {"backbone": body, "dino_head": head(body.embed_dim), "ibot_head": head(body.embed_dim)}
        )
        self.teacher = make_teacher(self.student)

    @staticmethod
    def views(cfg, image_size, patch_size):
        wide, small = (cfg.global_scale, 1.0), (cfg.local_scale, cfg.global_scale)
        common = {"jitter": (0.4, 0.4, 0.2, 0.1), "gray": 0.2}
        first = Augment(image_size, wide, blur=cfg.blur[0], **common)
        second = Augment(image_size, wide, blur=cfg.blur[1], solarize=cfg.solarize, **common)
        local = Augment(cfg.local_size, small, blur=cfg.blur[2], **common)
        augments = {"global": [first, second], "local": [local] * cfg.local_crops}  # [G, 3, H, W], [L, 3, h, w]
        side = image_size // patch_size
        share, ratios = cfg.mask_share, (cfg.mask_ratio_min, cfg.mask_ratio_max)

        def mask(sample, rng, i):
            count = int(stratified_ratio(sample, i, 2, share, ratios) * side * side)
            return block_mask((side, side), count, rng(MASKS + i)).reshape(-1)

        def view(sample, rng):
            masks = [mask(sample, rng, i) for i in range(2)]
            return crops(sample, augments, rng) | {"mask": np.stack(masks)}  # [G, N]

        return view

    def forward(self, batch, step):
        cfg, crops = self.cfg, batch["global"].shape[1]
        images, mask = batch["global"].flatten(0, 1), batch["mask"].flatten(0, 1)  # [B·G, ...]
        p_cls, p_patch = self.targets(images, mask, cfg.teacher_temperature(step))

        inputs, masks = [images], [mask]
        if batch["local"].shape[1]:
            inputs, masks = [images, batch["local"].flatten(0, 1)], [mask, None]
        features = self.student["backbone"](inputs, mask=masks)
        logits = self.student["dino_head"](torch.cat([f.cls for f in features]))  # [B·G + B·L, K]
        s_global = logits[: len(images)].unflatten(0, (-1, crops))  # [B, G, K]
        s_local = logits[len(images) :].unflatten(0, (len(s_global), batch["local"].shape[1]))  # [B, L, K]
        s_patch = self.student["ibot_head"](features[0].tokens[mask])  # [M, K]

        local, glob = self.dino(s_global, s_local, p_cls.unflatten(0, (-1, crops)))
        ibot = self.ibot(s_patch, p_patch, mask)
        cls = features[0].cls.unflatten(0, (-1, crops))
        spread = sum(koleo(cls[:, i]) for i in range(crops))
        loss = local + glob + cfg.ibot_weight * ibot + cfg.koleo_weight * spread
        logs = {"dino_local": local, "dino_global": glob, "ibot": ibot, "koleo": spread / crops}
        logs["teacher_entropy"] = -(p_cls * p_cls.clamp_min(1e-12).log()).sum(-1).mean()
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def targets(self, images: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's assignments for class tokens [B·G, K] and for masked patches [M, K]."""
        features = self.teacher["backbone"](images)
        p_cls = sinkhorn(self.teacher["dino_head"](features.cls), temperature)
        return p_cls, sinkhorn(self.teacher["ibot_head"](features.tokens[mask]), temperature)

    def dino(self, s_global: Tensor, s_local: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """(local term, global term): cross-entropies [B, crops] weighted by their number of (student, teacher) pairs, same crop left out.

        −Σ p log softmax(s) is linear in p, so the teacher crops that a student crop is compared with are averaged first.
        """
        crops, small = s_global.shape[1], s_local.shape[1]
        pairs_global, pairs_local = crops * (crops - 1), crops * small
        others = (p.sum(1, keepdim=True) - p) / (crops - 1)  # [B, G, K]
        glob = soft_cross_entropy(s_global, others, self.cfg.student_temperature).mean()
        if not small:
            return glob * 0, glob
        local = soft_cross_entropy(s_local, p.mean(1, keepdim=True), self.cfg.student_temperature).mean()
        total = pairs_global + pairs_local
        return local * pairs_local / total, glob * pairs_global / total

    def ibot(self, s: Tensor, p: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy on masked patches, averaged over each image's own, summed, over all global crops (mask [B·G, N])."""
        weight = (1 / mask.sum(1).clamp_min(1)).unsqueeze(1).expand_as(mask)[mask]  # [M]
        return (soft_cross_entropy(s, p, self.cfg.student_temperature) * weight).sum() / len(mask)

    def after_step(self, step):
        ema_update(self.teacher, self.student, self.cfg.momentum(step), self.skipped)

    def encoder(self):
        return self.teacher["backbone"]
