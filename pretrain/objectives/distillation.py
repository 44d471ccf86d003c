"""Distillation: any number of students learn one frozen teacher's features or prototypes in one run (DINOv2 and DINOv3, arXiv 2304.07193, 2508.10104).

    teacher: 2 global crops → class tokens and patches, once for all students;   each student: the same crops and n local ones, nothing masked
    prototypes: DINO and iBOT with the teacher's own heads: its assignments p, the student's new heads s, no mask, iBOT at the sampled patches
    features:   1 − cos(W x, ẑ) for class tokens and for patches; ẑ are the teacher's, with mean 0 and variance 1 of each coordinate over the batch
                + KL of softmax_j(cos(ẑ_i, ẑ_j) / τ) and softmax_j(cos(x_i, x_j) / τ) over the batch's class tokens (SEED, 2101.04731): W leaves the
                geometry of x itself free, which retrieval and k-NN look at
    Patches are compared at the student's grid: the teacher's map is averaged down or interpolated to it, so that cells cover the same pixels.
    loss = sum over students, none of which another one's numbers depend on;   what is exported: each student's moving average

Shapes: B images, G = 2 global and L local crops each, N patches of the teacher, M sampled patches of a student, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.multicrop import multicrop
from pretrain import teachers
from pretrain.config import Section
from pretrain.models.layers import Backbone
from pretrain.objectives.base import Objective
from pretrain.ops.align import align_map, align_mask, standardise
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import PrototypeHead
from pretrain.ops.koleo import koleo
from pretrain.ops.randomness import own_randomness
from pretrain.ops.relations import relation_loss
from pretrain.ops.self_distillation import by_image, dino_terms, health, ibot_term
from pretrain.ops.sinkhorn import sinkhorn
from pretrain.schedules import Schedule


@dataclass
class Config(Section):
    teacher: str = ""  # features: any source of weights; prototypes: a run of dinov2 or dinov3, or RUN/checkpoints/STEP
    students: list[str] = field(
        default_factory=list
    )  # beside `model`: "convnext_tiny", or with options "vit dim=192 heads=3"
    loss: Literal["prototypes", "features"] = "prototypes"
    momentum: Literal["auto"] | Schedule = field(default_factory=lambda: Schedule(0.994, kind="cosine", final=1.0))
    student_temperature: float = 0.1
    teacher_temperature: Literal["auto"] | Schedule = field(
        default_factory=lambda: Schedule(0.07, start=0.04, warmup=0.1)
    )
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int | None = None  # images of the batch in one; null: all of it
    patch_weight: float = 1.0  # of `features`, as the next two
    relation_weight: float = 1.0
    relation_temperature: float = 0.1  # τ
    local_crops: int = 8
    local_size: int = 96  # pixels
    global_scale: float = 0.32  # smallest share of the image's area in a global crop, and the largest in a local one
    local_scale: float = 0.05
    mask_share: float = 0.5  # of the global crops have sampled patches
    mask_ratio_min: float = 0.1
    mask_ratio_max: float = 0.5
    blur: list[float] = field(
        default_factory=lambda: [1.0, 0.1, 0.5]
    )  # first, second, local; released models: 0, .9, .5
    solarize: float = 0.2  # probability, second global crop only
    flip: float = 0.5  # probability


class Distillation(Objective):
    couples_batch = True

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        if not cfg.teacher:
            raise ValueError(
                "objective.teacher is empty; name an export, a transformers or timm folder, an official file, or a run"
            )
        self.teacher = nn.ModuleDict({"backbone": teachers.like(cfg.teacher)})
        sizes = teachers.heads_of(cfg.teacher) if cfg.loss == "prototypes" else {}
        self.teacher.update({name: PrototypeHead(*size) for name, size in sizes.items()})
        teachers.load_teacher(self.teacher, cfg.teacher)
        self.teacher.requires_grad_(False).eval()
        width = self.teacher["backbone"].embed_dim

        def student(body: nn.Module) -> nn.ModuleDict:
            if cfg.loss == "features":
                return nn.ModuleDict(
                    {
                        "backbone": body,
                        "cls_head": nn.Linear(body.embed_dim, width),
                        "patch_head": nn.Linear(body.embed_dim, width),
                    }
                )
            heads = {name: PrototypeHead(body.embed_dim, *size[1:]) for name, size in sizes.items()}
            return nn.ModuleDict({"backbone": body, **heads})

        builders = {"model": backbone} | teachers.builders(cfg.students)
        self.students = nn.ModuleDict()
        for name, build in builders.items():
            with own_randomness(name):
                self.students[name] = student(build())
            self.check_reads(f"objective.students: {name}", self.students[name]["backbone"])
            self.check_sizes(name, self.students[name]["backbone"])
        self.check_reads(f"objective.teacher = {cfg.teacher}", self.teacher["backbone"])
        self.averages = nn.ModuleDict({name: make_teacher(s["backbone"]).eval() for name, s in self.students.items()})

    def check_reads(self, what: str, body: Backbone) -> None:
        """Raises ValueError for a network that cannot read what the recipe's model does."""
        own, channels = (getattr(one.cfg, "in_channels", None) for one in (body, self.students["model"]["backbone"]))
        if own != channels:
            reads = "text" if own is None else f"images of {own} channels"
            raise ValueError(f"{what}: reads {reads}, but model.in_channels = {channels}; name one that reads as many")

    def check_sizes(self, name: str, student: Backbone) -> None:
        """Raises ValueError for crops that a student cannot take, and for global ones whose border its cells leave out, so that they are not the teacher's."""
        local, cell = self.cfg.local_size, student.patch_size
        image = self.students["model"]["backbone"].image_size
        if image % cell:
            raise ValueError(f"model.image_size = {image} pixels does not divide into cells of {cell}, those of {name}")
        if self.cfg.local_crops and local < cell:
            raise ValueError(f"objective.local_size = {local} pixels is less than one cell ({cell}) of {name}")
        if self.cfg.local_crops and student.whole_patches and local % cell:
            raise ValueError(
                f"objective.local_size = {local} pixels does not divide into patches of {cell}, those of {name}"
            )

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        self.averages.eval()
        return self

    @staticmethod
    def views(cfg, image_size, patch_size):
        # patches are sampled on the teacher's grid; local crops are for students alone, which have been asked
        return multicrop(cfg, image_size, teachers.cell_of(cfg.teacher), local_patch=1)

    def forward(self, batch, step):
        images = batch["global"].flatten(0, 1)  # [B·G, ...]
        with torch.no_grad():
            teacher = self.teacher["backbone"](images)
        target = self.prototypes_of(teacher, step) if self.cfg.loss == "prototypes" else standardise(teacher.cls)
        total, logs = torch.zeros((), device=images.device), {}
        inputs = [images, batch["local"].flatten(0, 1)] if batch["local"].shape[1] else [images]
        for name, student in self.students.items():
            with own_randomness(name):  # of drop path and rotary positions
                features = student["backbone"](inputs)
            compare = self.by_prototypes if self.cfg.loss == "prototypes" else self.by_features
            loss, own = compare(student, features, teacher, target, batch, step)
            total = total + loss
            logs |= {f"{name}/{key}": value.detach() for key, value in {"loss": loss, **own}.items()}
        return total, logs

    @torch.no_grad()
    def prototypes_of(self, teacher, step: int) -> Tensor:
        """The teacher's assignments for class tokens [B·G, K]."""
        return sinkhorn(self.teacher["dino_head"](teacher.cls), self.cfg.teacher_temperature(step))

    def by_prototypes(
        self, student, features, teacher, p_cls: Tensor, batch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO, iBOT and KoLeo of one student, as in DINOv2."""
        cfg, crops, own = self.cfg, batch["global"].shape[1], features[0]
        mask = align_mask(batch["mask"].flatten(0, 1), teacher.grid, own.grid)  # [B·G, N of the student]
        with torch.no_grad():
            patches = align_map(teacher.tokens, teacher.grid, own.grid)[mask]
            p_patch = sinkhorn(self.teacher["ibot_head"](patches), cfg.teacher_temperature(step))  # [M, K]
        cls, small = by_image(features, crops)  # [B, G, D], [B, L, D]
        p_cls = p_cls.unflatten(0, (-1, crops))
        local, glob = dino_terms(student["dino_head"], cls, small, p_cls, cfg.student_temperature)
        ibot = ibot_term(student["ibot_head"], own.tokens[mask], p_patch, mask, cfg.student_temperature)
        spread = sum(koleo(cls[:, i], cfg.koleo_group) for i in range(crops))
        loss = local + glob + cfg.ibot_weight * ibot + cfg.koleo_weight * spread
        return loss, {
            "dino": local + glob,
            "ibot": ibot,
            "koleo": spread / crops,
            **health(cls[:, 0], p_cls.flatten(0, 1)),
        }

    def by_features(
        self, student, features, teacher, z_cls: Tensor, batch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Distances in direction of one student's projected features from the teacher's; of local crops from the mean over its global ones."""
        crops, small = batch["global"].shape[1], batch["local"].shape[1]
        own = features[0]
        away = self.distance(student["cls_head"](own.cls), z_cls)
        relations = relation_loss(own.cls, z_cls, self.cfg.relation_temperature)
        if small:
            both = z_cls.unflatten(0, (-1, crops)).mean(1)  # [B, D]
            local = self.distance(student["cls_head"](features[1].cls), both.repeat_interleave(small, 0))
            away = (crops * away + small * local) / (crops + small)
        tokens = align_map(teacher.tokens, teacher.grid, own.grid).flatten(0, 1)
        patches = self.distance(student["patch_head"](own.tokens.flatten(0, 1)), standardise(tokens))
        loss = away + self.cfg.patch_weight * patches + self.cfg.relation_weight * relations
        return loss, {"cls": away, "patches": patches, "relations": relations}

    @staticmethod
    def distance(x: Tensor, z: Tensor) -> Tensor:
        """1 − cosine of rows [R, D], their mean, in fp32 or wider."""
        return 1 - F.cosine_similarity(x.to(z.dtype), z, dim=-1).mean()

    def after_step(self, step):
        for name, student in self.students.items():
            ema_update(self.averages[name], student["backbone"], self.cfg.momentum(step), self.skipped)

    def encoder(self):
        return self.averages["model"]

    def encoders(self):
        return dict(self.averages.items())
