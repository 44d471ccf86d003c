"""DINOv3: DINO, iBOT and KoLeo with constant schedules, and Gram anchoring for dense features (arXiv 2508.10104).

    teacher: 2 global crops, not masked → Sinkhorn over prototypes
    student: the same crops with block masks, and n local crops
    L_dino = local_weight · (pairs with local crops) + (pairs of global crops), divided by the number of all pairs
    L_ibot on masked patches, as in DINOv2
    L_gram = mean over pairs of patches of (x_i·x_j − g_i·g_j)²
             g: patches of the same crops at a higher resolution from an earlier teacher, resized to the student's grid
    loss   = L_dino + ibot_weight · L_ibot + koleo_weight · (KoLeo, summed over the global crops) + gram_weight · L_gram
    after each step: teacher ← m·teacher + (1 − m)·student;   every gram_every steps: Gram teacher ← teacher

Shapes: B images, G = 2 global and L local crops each, N patches of a global crop, M masked patches in the batch,
D width, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import Facts, option, option_if
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.multicrop import PART_OF, multicrop
from pretrain.interchange import weights
from pretrain.models.layers import Features
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import PrototypeHeads
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.gram import gram_loss, resize_map
from pretrain.ops.heads import Lengths, PrototypeHead, head_sizes
from pretrain.ops.koleo import koleo
from pretrain.ops.self_distillation import by_image, dino_terms, health, ibot_term, select_patches
from pretrain.ops.sinkhorn import sinkhorn


def twice(facts: Facts) -> int | None:
    """Twice the image size (DINOv3: 512 for 256)."""
    options, size = facts.section, facts.model.get("image_size")
    return 2 * size if size and options["gram_teacher"] != "none" and not options["resolutions"] else None


@dataclass
class Config(PrototypeHeads):
    unit_prototypes: bool = False  # whether prototypes are normalised to length 1
    # weight of the DINO loss on local crops; the weight of global crops is 1
    local_weight: Schedule = option(lambda: Schedule(1.0))
    koleo_neighbours: int = option(1, low=1)  # nearest neighbours that KoLeo uses
    # none, an export, a checkpoint (RUN/checkpoints/STEP), init (the Gram teacher of init.run), or ema (the teacher at
    # the start)
    gram_teacher: str = "none"
    # weight of the Gram loss, which keeps the similarities of patches near the Gram teacher's
    gram_weight: Schedule = option_if(lambda: Schedule(2.0), "gram_teacher", unless="none")
    # side in pixels of the global crops that the Gram teacher gets
    gram_size: int | Literal["auto"] = option_if(
        "auto", "gram_teacher", unless="none", former_default=512, low=1, auto=twice
    )
    gram_every: int = option_if(
        10000, "gram_teacher", unless="none", low=1
    )  # steps between updates of the Gram teacher
    gram_updates: int = option_if(3, "gram_teacher", unless="none", low=0)  # largest number of these updates
    # patches whose similarities are compared
    gram_tokens: Literal["all", "masked", "unmasked"] = option_if("all", "gram_teacher", unless="none")
    # similarities below 0: keep them, clip them to 0, or clip them where the Gram teacher's are negative
    gram_negatives: Literal["keep", "clip", "clip_teacher"] = option_if("keep", "gram_teacher", unless="none")
    # false: compare patches across all images of the batch
    gram_per_image: bool = option_if(True, "gram_teacher", unless="none")
    # rows of [global, local, Gram pixels, weight]; each step draws one row
    resolutions: list[list[float]] = option(list)

    def neighbours(self) -> int:
        return self.koleo_neighbours

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        gram = {"objective.gram_teacher": "ema", "objective.gram_size": 64}
        return [{**super().tiny()[0], **gram, "objective.koleo_group": 4}]


class DINOv3(Objective):
    kept_in_eval = ("teacher", "gram")  # no drop path, and positions without jitter
    averaged = {"student": "teacher"}
    couples_batch = True
    part_of = PART_OF
    encoder_name = "teacher.backbone"
    reinitialized = ("gram.",)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone(mask_token=True)
        dino, ibot = head_sizes(cfg)
        lengths: Lengths = "unit" if cfg.unit_prototypes else "unnormalised"
        dino_head, ibot_head = (
            PrototypeHead(body.embed_dim, *sizes, lengths, cfg.head_norms) for sizes in (dino, ibot)
        )
        self.student = nn.ModuleDict({"backbone": body, "dino_head": dino_head, "ibot_head": ibot_head})
        self.teacher = make_teacher(self.student, batch_statistics=True).eval()
        self.gram = make_teacher(body).eval() if cfg.gram_teacher != "none" else None
        if cfg.gram_teacher not in ("none", "ema", "init"):
            weights.load_into(self.gram, cfg.gram_teacher)

    def before_first_step(self, loaded: set[str]) -> None:
        if self.cfg.gram_teacher == "init" and not any(key.startswith("gram.") for key in loaded):
            raise ValueError(
                "objective.gram_teacher = 'init': init.run names no checkpoint that holds a Gram teacher;"
                " write an init.run that has one, or objective.gram_teacher=ema"
            )
        if self.cfg.gram_teacher == "ema":
            ema_update(self.gram, self.teacher["backbone"], 0.0)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        if cfg.gram_teacher == "none":
            return multicrop(cfg, about.image_size, about.patch_size, 0, cfg.resolutions)
        return multicrop(
            cfg, about.image_size, about.patch_size, 1 if cfg.resolutions else cfg.gram_size, cfg.resolutions
        )

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
        koleo_loss = sum(koleo(cls[:, i], cfg.koleo_group, cfg.koleo_neighbours) for i in range(crops))
        loss = (
            cfg.local_weight(step) * local_loss + global_loss + cfg.ibot_weight * ibot + cfg.koleo_weight * koleo_loss
        )
        logs = {"dino_local": local_loss, "dino_global": global_loss, "ibot": ibot, "koleo": koleo_loss / crops}
        if self.gram is not None:
            logs["gram"] = self.anchor(features[0], batch["gram"].flatten(0, 1), mask)
            loss = loss + cfg.gram_weight(step) * logs["gram"]
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

    def anchor(self, student: Features, images: Tensor, mask: Tensor) -> Tensor:
        """The Gram loss between the student's features of global crops and the Gram teacher's features of `images`, the
        same crops at a higher resolution [B·G, 3, S, S]."""
        cfg = self.cfg
        assert self.gram is not None
        with torch.no_grad():
            features = self.gram(images)
            target = resize_map(features.tokens, features.grid, student.grid)  # [B·G, N, D]
        return gram_loss(student.tokens, target, mask, cfg.gram_tokens, cfg.gram_negatives, cfg.gram_per_image)

    def after_step(self, step: int) -> None:
        ema_update(self.teacher, self.student, self.cfg.momentum(step), self.skipped)
        if self.gram is None:
            return
        every, max_updates = self.cfg.gram_every, self.cfg.gram_updates
        if (step + 1) % every == 0 and (step + 1) // every <= max_updates:
            ema_update(self.gram, self.teacher["backbone"], 0.0)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher["backbone"])}
