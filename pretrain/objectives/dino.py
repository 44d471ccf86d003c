"""DINO: a student predicts its moving average's centred and sharpened outputs for other crops (arXiv 2104.14294).

    teacher: 2 global crops;   student: the same crops and n local ones
    P_t = softmax((g_t(x) − C) / τ_t),   P_s = softmax(g_s(x) / τ_s)                                      (eq. 1, §3.1)
    loss = mean over (student crop, other teacher crop) of −Σ P_t log P_s                                 (eq. 3)
    after each step: teacher ← m·teacher + (1 − m)·student;   C ← m_c·C + (1 − m_c)·(mean of g_t(x))      (eq. 4)

The centre C keeps one output from dominating, the low temperature τ_t of the teacher keeps the outputs from becoming
uniform. With `centering: sinkhorn`, P_t is instead assigned by Sinkhorn-Knopp over the batch (§5.1). The head ends with
weight-normed prototypes of length 1; `optim.freeze_last_layer` keeps them fixed in the first epoch. As published, batch
norms of a ResNet teacher normalise by the teacher's own batch.

Shapes: B images, G = 2 global and L local crops each, D width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Facts, option, option_if
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.multicrop import PART_OF, unmasked_crops
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import (
    Crops,
    DINOHeadOptions,
    inherited,
    momentum,
    sinkhorn_temperature,
    small_data,
    temperature,
)
from pretrain.ops.center import Center
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import Lengths, PrototypeHead
from pretrain.ops.precision import wide
from pretrain.ops.self_distillation import by_image, dino_terms, health
from pretrain.ops.sinkhorn import sinkhorn


def centering(facts: Facts) -> str:
    """Sinkhorn-Knopp with fewer than 100,000 samples, else the centre."""
    return "sinkhorn" if small_data(facts) else "mean"


def assignment_temperature(facts: Facts) -> Schedule:
    """As `sinkhorn_temperature` with Sinkhorn-Knopp, else as `temperature`."""
    return (sinkhorn_temperature if facts.section["centering"] == "sinkhorn" else temperature)(facts)


@dataclass
class Config(Crops, DINOHeadOptions):
    remedies = {
        "teacher_entropy": "lower objective.teacher_temperature or the number of prototypes",
        "feature_std": "raise objective.momentum",
        "rank": "raise objective.momentum",
    }

    # prototypes of length 1; false: they are not normalised, and have length 1 at first. In its longest runs, the
    # published code trains lengths and directions separately (weight norm)
    unit_prototypes: bool = True
    # how the teacher's outputs are kept from collapsing. mean: the centre C is subtracted; sinkhorn: Sinkhorn-Knopp over
    # the batch in place of centre and softmax, as in the paper's §5.1; auto: sinkhorn with fewer than 100,000 samples
    centering: Literal["mean", "sinkhorn", "auto"] = option("mean", auto=(inherited, centering))
    student_temperature: float = option(0.1, above=0)  # τ_s: the student's logits are divided by it before the softmax
    # τ_t, the same for the teacher's logits
    teacher_temperature: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.04), above=0, auto=assignment_temperature
    )
    # m, the share of its weights that the teacher keeps in a step
    momentum: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.996, kind="cosine", final=1.0), low=0, high=1, auto=momentum
    )
    center_momentum: float = option_if(0.9, "centering", unless="sinkhorn", low=0, high=1)  # m_c
    global_scale: float = option(0.4, above=0, high=1)  # smallest share of the image's area in a global crop


class DINO(Objective):
    kept_in_eval = ("teacher",)  # no drop path, and positions without jitter
    averaged = {"student": "teacher"}
    part_of = PART_OF

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone()
        lengths: Lengths = "unit" if cfg.unit_prototypes else "unnormalised"
        head = PrototypeHead(
            body.embed_dim, cfg.head_hidden, cfg.head_bottleneck, cfg.prototypes, lengths, cfg.head_norms
        )
        if not cfg.unit_prototypes:  # the published lengths are 1 at first, too
            with torch.no_grad():
                head.prototypes.copy_(F.normalize(head.prototypes, dim=-1))
        self.student = nn.ModuleDict({"backbone": body, "head": head})
        self.teacher = make_teacher(self.student, batch_statistics=True).eval()
        self.center = Center(cfg.prototypes) if cfg.centering == "mean" else None
        self.couples_batch = self.center is None

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return unmasked_crops(cfg, about.image_size, about.patch_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        cfg, crops = self.cfg, batch["global"].shape[1]
        images = batch["global"].flatten(0, 1)  # [B·G, ...]
        p = self.targets(images, step)  # [B·G, K]
        sizes = [images, *([batch["local"].flatten(0, 1)] if batch["local"].shape[1] else [])]
        cls, small = by_image([f.cls for f in self.student["backbone"](sizes)], crops)  # [B, G, D], [B, L, D]
        local, glob = dino_terms(self.student["head"], cls, small, p.unflatten(0, (-1, crops)), cfg.student_temperature)
        logs = {"dino_local": local.detach(), "dino_global": glob.detach()} | health(cls[:, 0].detach(), p)
        # what the student can reduce of the loss, which also rises and falls with the entropy of the teacher's outputs
        logs["kl"] = (local + glob).detach() - logs["teacher_entropy"]
        return local + glob, logs

    @torch.no_grad()
    def targets(self, images: Tensor, step: int) -> Tensor:
        """P_t [B·G, K] of global crops [B·G, 3, H, W], in fp32 or wider."""
        outputs = self.teacher["head"](self.teacher["backbone"](images).cls)
        outputs, temperature = wide(outputs), self.cfg.teacher_temperature(step)
        if self.center is None:
            return sinkhorn(outputs, temperature)
        self.center.hold(outputs, step)
        return ((outputs - self.center.mean) / temperature).softmax(-1)

    def after_step(self, step: int) -> None:
        ema_update(self.teacher, self.student, self.cfg.momentum(step), self.skipped)
        if self.center is not None:
            self.center.update(step, self.cfg.center_momentum, self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher["backbone"])}
