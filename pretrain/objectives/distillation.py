"""Distillation: one frozen teacher trains any number of students in one run (arXiv 2304.07193, 2508.10104).

    crops:      teacher: 2 global ones, in one forward for all students; each student: also n local ones; no masks
    prototypes: the DINO and iBOT losses with the teacher's heads and new student heads; iBOT on the sampled patches
    features:   1 − cos(W x, ẑ) on class tokens and on patches; ẑ: the teacher's features, standardised over the batch
                + KL(softmax_j cos(ẑ_i, ẑ_j)/τ ‖ softmax_j cos(x_i, x_j)/τ) on class tokens (SEED, 2101.04731), because
                the first term does not constrain the distances between the x, which retrieval and k-NN use
    Patches are compared on the student's grid, to which the teacher's feature map is averaged or interpolated.
    loss = sum over students; no student influences another. The export is the moving average of each student.

Shapes: B images, G = 2 global and L local crops each, N patches, M sampled patches of a student, D width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option, option_if
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.multicrop import PART_OF, multicrop
from pretrain.interchange import teachers
from pretrain.models.layers import Backbone, Features
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import SelfDistillation, momentum, temperature
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import PrototypeHead
from pretrain.ops.koleo import koleo
from pretrain.ops.randomness import named_generator
from pretrain.ops.resize_features import align_map, standardise
from pretrain.ops.self_distillation import by_image, dino_terms, health, ibot_term, select_patches
from pretrain.ops.similarity_distillation import relation_loss
from pretrain.ops.sinkhorn import sinkhorn


@dataclass
class Config(SelfDistillation):
    teacher: str = ""  # features: any source of weights; prototypes: a run of dinov2 or dinov3, or RUN/checkpoints/STEP
    students: list[str] = option(list)  # in addition to `model`: "convnext_tiny", or with options "vit dim=192 heads=3"
    loss: Literal["prototypes", "features"] = "prototypes"  # what students learn: the teacher's assignments or features
    momentum: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.994, kind="cosine", final=1.0), low=0, high=1, auto=momentum
    )
    student_temperature: float = option_if(0.1, "loss", "prototypes", above=0)
    teacher_temperature: Literal["auto"] | Schedule = option_if(
        lambda: Schedule(0.07, start=0.04, warmup=0.1), "loss", "prototypes", above=0, auto=temperature
    )
    ibot_weight: float = option_if(1.0, "loss", "prototypes")
    koleo_weight: float = option_if(0.1, "loss", "prototypes")
    koleo_group: int | None = option_if(None, "loss", "prototypes", low=2)
    patch_weight: float = option_if(
        1.0, "loss", "features"
    )  # weight of the loss on patches; that on class tokens has 1
    relation_weight: float = option_if(1.0, "loss", "features")  # weight of the loss on similarities between crops (KL)
    relation_temperature: float = option_if(0.1, "loss", "features", above=0)  # τ

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        crops = {"objective.local_size": 16, "objective.local_crops": 2}
        features = {"objective.loss": "features", "objective.teacher": "{export}", **crops}
        return [features, {"objective.loss": "prototypes", "objective.teacher": "{run dinov2}"}]


class Distillation(Objective):
    kept_in_eval = ("teacher", "averages")
    couples_batch = True
    part_of = PART_OF
    encoder_name = "averages.model"

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        if not cfg.teacher:
            raise ValueError("objective.teacher is empty; write an export, a transformers or timm folder, or a run")
        teacher = teachers.build_like(cfg.teacher)
        self.teacher: Any = nn.ModuleDict({"backbone": teacher})
        sizes = teachers.head_arguments(cfg.teacher) if cfg.loss == "prototypes" else {}
        self.teacher.update({name: PrototypeHead(*size) for name, size in sizes.items()})
        teachers.load_teacher(self.teacher, cfg.teacher)
        self.teacher.requires_grad_(False).eval()

        def student(body: nn.Module) -> nn.ModuleDict:
            if cfg.loss == "features":
                widths = body.embed_dim, teacher.embed_dim
                heads: dict[str, nn.Module] = {name: nn.Linear(*widths) for name in ("cls_head", "patch_head")}
            else:
                heads = {name: PrototypeHead(body.embed_dim, *size[1:]) for name, size in sizes.items()}
            return nn.ModuleDict({"backbone": body, **heads})

        builders = {"model": backbone} | teachers.student_builders(cfg.students)
        bodies: dict[str, Backbone] = {}
        self.students: Any = nn.ModuleDict()
        for name, build in builders.items():
            with named_generator(name):
                bodies[name] = build()
                self.students[name] = student(bodies[name])
            teachers.check_reads(f"objective.students: {name}", bodies[name], bodies["model"])
            self.check_sizes(name, bodies[name])
        teachers.check_reads(f"objective.teacher = {cfg.teacher}", teacher, bodies["model"])
        self.averages = nn.ModuleDict({name: make_teacher(body).eval() for name, body in bodies.items()})
        self.averaged = {f"students.{name}.backbone": f"averages.{name}" for name in bodies}

    def check_sizes(self, name: str, student: Backbone) -> None:
        """Raises ValueError for crops that a student's patches or cells do not tile."""
        local, cell = self.cfg.local_size, student.patch_size
        image = self.students["model"]["backbone"].image_size
        if image % cell:
            raise ValueError(f"model.image_size = {image} pixels does not divide into cells of {cell}, those of {name}")
        if self.cfg.local_crops and local < cell:
            raise ValueError(f"objective.local_size = {local} pixels is less than one cell ({cell}) of {name}")
        if self.cfg.local_crops and student.whole_patches and local % cell:
            raise ValueError(f"objective.local_size = {local} pixels does not divide into {name}'s patches of {cell}")

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        # Patches are sampled on the teacher's grid; only students get local crops (see `check_sizes`).
        cells = sorted({about.patch_size, *teachers.patch_sizes_of(cfg.students)}) if cfg.loss == "prototypes" else []
        return multicrop(cfg, about.image_size, teachers.patch_size_of(cfg.teacher), local_patch=1, cells=tuple(cells))

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["global"].flatten(0, 1)  # [B·G, ...]
        with torch.no_grad():
            teacher = self.teacher["backbone"](images)
        target = self.prototypes_of(teacher, step) if self.cfg.loss == "prototypes" else standardise(teacher.cls)
        total, logs = torch.zeros((), device=images.device), dict[str, Tensor]()
        inputs = [images, batch["local"].flatten(0, 1)] if batch["local"].shape[1] else [images]
        for name, student in self.students.items():
            with named_generator(name):  # of drop path and rotary positions
                features = student["backbone"](inputs)
            compare = self.by_prototypes if self.cfg.loss == "prototypes" else self.by_features
            loss, terms = compare(student, features, teacher, target, batch, step)
            total = total + loss
            logs |= {f"{name}/{key}": value.detach() for key, value in {"loss": loss, **terms}.items()}
        return total, logs

    @torch.no_grad()
    def prototypes_of(self, teacher: Features, step: int) -> Tensor:
        """The teacher's assignments of class tokens to prototypes [B·G, K]."""
        return sinkhorn(self.teacher["dino_head"](teacher.cls), self.cfg.teacher_temperature(step))

    def by_prototypes(
        self, student: Any, features: list[Features], teacher: Features, p_cls: Tensor, batch: Batch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logs): DINO, iBOT and KoLeo of one student, as in DINOv2; `p_cls` [B·G, K]."""
        cfg, crops, large = self.cfg, batch["global"].shape[1], features[0]  # large: features of the global crops
        masked, weight = (batch[f"mask_{key}_{student['backbone'].patch_size}"] for key in ("indices", "weight"))  # [M]
        with torch.no_grad():
            patches = select_patches(align_map(teacher.tokens, teacher.grid, large.grid), masked)
            p_patch = sinkhorn(self.teacher["ibot_head"](patches), cfg.teacher_temperature(step))  # [M, K]
        cls, local_cls = by_image([f.cls for f in features], crops)  # [B, G, D], [B, L, D]
        tau = cfg.student_temperature
        local_loss, global_loss = dino_terms(student["dino_head"], cls, local_cls, p_cls.unflatten(0, (-1, crops)), tau)
        patches = select_patches(large.tokens, masked)  # [M, D]
        ibot = ibot_term(student["ibot_head"], patches, p_patch, weight, len(large.cls), tau)
        koleo_loss: Any = sum(koleo(cls[:, i], cfg.koleo_group) for i in range(crops))
        loss = local_loss + global_loss + cfg.ibot_weight * ibot + cfg.koleo_weight * koleo_loss
        logs = {"dino": local_loss + global_loss, "ibot": ibot, "koleo": koleo_loss / crops}
        return loss, logs | health(cls[:, 0], p_cls)

    def by_features(
        self, student: Any, features: list[Features], teacher: Features, z_cls: Tensor, batch: Batch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logs): cosine distances of one student's projected features from the teacher's `z_cls` [B·G, D]. Local
        crops are compared with the mean of `z_cls` over the global crops."""
        crops, local_crops, large = batch["global"].shape[1], batch["local"].shape[1], features[0]
        cls = self.distance(student["cls_head"](large.cls), z_cls)
        relations = relation_loss(large.cls, z_cls, self.cfg.relation_temperature)
        if local_crops:
            mean = z_cls.unflatten(0, (-1, crops)).mean(1)  # [B, D]
            local = self.distance(student["cls_head"](features[1].cls), mean.repeat_interleave(local_crops, 0))
            cls = (crops * cls + local_crops * local) / (crops + local_crops)
        tokens = align_map(teacher.tokens, teacher.grid, large.grid).flatten(0, 1)  # [B·G·N, D]
        patches = self.distance(student["patch_head"](large.tokens.flatten(0, 1)), standardise(tokens))
        loss = cls + self.cfg.patch_weight * patches + self.cfg.relation_weight * relations
        return loss, {"cls": cls, "patches": patches, "relations": relations}

    @staticmethod
    def distance(x: Tensor, z: Tensor) -> Tensor:
        """The mean of 1 − cosine over rows [R, D], in fp32 or wider."""
        return 1 - F.cosine_similarity(x.to(z.dtype), z, dim=-1).mean()

    def after_step(self, step: int) -> None:
        for name, student in self.students.items():
            ema_update(self.averages[name], student["backbone"], self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {name: Exported(average) for name, average in self.averages.items()}
