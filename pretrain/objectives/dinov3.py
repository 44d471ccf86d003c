"""DINOv3: DINO, iBOT and KoLeo on a schedule without an end, and Gram anchoring that keeps dense features sharp (arXiv 2508.10104).

    teacher: 2 global crops, unmasked → Sinkhorn over prototypes;   student: the same crops with block masks, and n small local crops
    L_dino = local_weight · (pairs with local crops) + (pairs of global crops), over all pairs;   L_ibot on masked patches, as in DINOv2
    L_gram = mean over pairs of patches of (x_i·x_j − g_i·g_j)²;   g: an earlier teacher's patches of the same crops, larger, resized to the student's grid
    loss   = L_dino + ibot_weight · L_ibot + koleo_weight · (KoLeo, summed over the global crops) + gram_weight · L_gram
    teacher ← m·teacher + (1 − m)·student;   the Gram teacher ← teacher at a few steps

Shapes: B images, G = 2 global and L local crops each, N patches of a global crop, M masked patches in the batch, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from data_pipeline.multicrop import multicrop
from pretrain import weights
from pretrain.config import Section
from pretrain.objectives.base import Objective
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.gram import gram_loss, resize_map
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
    unit_prototypes: bool = False  # of length 1, as in DINOv2
    student_temperature: float = 0.1
    teacher_temperature: Literal["auto"] | Schedule = field(
        default_factory=lambda: Schedule(0.07, start=0.04, warmup=0.1)
    )
    momentum: Literal["auto"] | Schedule = field(default_factory=lambda: Schedule(0.994))
    local_weight: Schedule = field(default_factory=lambda: Schedule(1.0))
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int | None = (
        None  # images of the batch in one; null: all of it. The papers' "per GPU" is their batch on each GPU
    )
    koleo_neighbours: int = 1  # in a group
    gram_teacher: str = "none"  # or an export, a checkpoint (RUN/checkpoints/STEP), init (the one of init.run), ema (the teacher at the start)
    gram_weight: Schedule = field(default_factory=lambda: Schedule(2.0))
    gram_size: int = 512  # pixels of what the Gram teacher sees of a global crop
    gram_every: int = 10000  # steps until the teacher takes the Gram teacher's place
    gram_updates: int = 3  # so many times
    gram_tokens: Literal["all", "masked", "unmasked"] = "all"
    gram_negatives: Literal["keep", "clip", "clip_teacher"] = "keep"  # similarities below 0
    gram_per_image: bool = True
    resolutions: list[list[float]] = field(
        default_factory=list
    )  # each step one of [global, local, Gram pixels, weight]
    local_crops: int = 8
    local_size: int = 96  # pixels
    global_scale: float = 0.32  # smallest share of the image's area in a global crop, and the largest in a local one
    local_scale: float = 0.05
    mask_share: float = 0.5  # of the global crops are masked
    mask_ratio_min: float = 0.1
    mask_ratio_max: float = 0.5
    blur: list[float] = field(
        default_factory=lambda: [1.0, 0.1, 0.5]
    )  # first, second, local; released models: 0, .9, .5
    solarize: float = 0.2  # probability, second global crop only
    flip: float = 0.5  # probability; the 7B model: 0


class DINOv3(Objective):
    couples_batch = True
    fresh = ("gram.",)

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        body = backbone(mask_token=True)
        dino, ibot = head_sizes(cfg)
        dino_head = PrototypeHead(body.embed_dim, *dino, unit=cfg.unit_prototypes)
        ibot_head = PrototypeHead(body.embed_dim, *ibot, unit=cfg.unit_prototypes)
        self.student = nn.ModuleDict({"backbone": body, "dino_head": dino_head, "ibot_head": ibot_head})
        self.teacher = make_teacher(self.student).eval()
        self.gram = make_teacher(body).eval() if cfg.gram_teacher != "none" else None
        if cfg.gram_teacher not in ("none", "ema", "init"):
            weights.load_into(self.gram, cfg.gram_teacher)

    def started(self, loaded):
        if self.cfg.gram_teacher == "init" and not any(key.startswith("gram.") for key in loaded):
            raise ValueError("objective.gram_teacher = 'init': init.run names no checkpoint that holds a Gram teacher")
        if self.cfg.gram_teacher == "ema":
            ema_update(self.gram, self.teacher["backbone"], 0.0)

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()  # its inputs are whole, and its positions as they are
        if self.gram is not None:
            self.gram.eval()
        return self

    @staticmethod
    def views(cfg, image_size, patch_size):
        if cfg.gram_teacher == "none":
            return multicrop(cfg, image_size, patch_size, 0, cfg.resolutions)
        return multicrop(cfg, image_size, patch_size, 1 if cfg.resolutions else cfg.gram_size, cfg.resolutions)

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
        spread = sum(koleo(cls[:, i], cfg.koleo_group, cfg.koleo_neighbours) for i in range(crops))
        loss = cfg.local_weight(step) * local + glob + cfg.ibot_weight * ibot + cfg.koleo_weight * spread
        logs = {"dino_local": local, "dino_global": glob, "ibot": ibot, "koleo": spread / crops}
        if self.gram is not None:
            logs["gram"] = self.anchor(features[0], batch["gram"].flatten(0, 1), mask)
            loss = loss + cfg.gram_weight(step) * logs["gram"]
        logs |= health(cls[:, 0], p_cls)
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def targets(self, images: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's assignments for class tokens [B·G, K] and for masked patches [M, K]."""
        features = self.teacher["backbone"](images)
        p_cls = sinkhorn(self.teacher["dino_head"](features.cls), temperature)
        return p_cls, sinkhorn(self.teacher["ibot_head"](features.tokens[mask]), temperature)

    def anchor(self, student, images: Tensor, mask: Tensor) -> Tensor:
        """The Gram term of the student's global features and the larger images [B·G, 3, S, S]."""
        cfg = self.cfg
        with torch.no_grad():
            features = self.gram(images)
            target = resize_map(features.tokens, features.grid, student.grid)  # [B·G, N, D]
        return gram_loss(student.tokens, target, mask, cfg.gram_tokens, cfg.gram_negatives, cfg.gram_per_image)

    def after_step(self, step):
        ema_update(self.teacher, self.student, self.cfg.momentum(step), self.skipped)
        if self.gram is None:
            return
        every, most = self.cfg.gram_every, self.cfg.gram_updates
        if (step + 1) % every == 0 and (step + 1) // every <= most:
            ema_update(self.gram, self.teacher["backbone"], 0.0)

    def encoder(self):
        return self.teacher["backbone"]
