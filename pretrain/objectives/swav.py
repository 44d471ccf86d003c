"""SwAV: a crop of an image predicts the cluster assignments of another one, made online (arXiv 2006.09882).

    z = g(f(crop)), c_1 … c_K: prototypes, all of length 1
    q: the assignments of the batch's global crops, from z·c/ε by three iterations of Sinkhorn-Knopp, which share the
       prototypes evenly among the images of the batch and of the queue                                    (eqs. 3 to 5)
    ℓ(z_t, q_s) = −Σ_k q_s^k log softmax_k(z_t·c/τ)                                                        (eq. 2)
    loss = mean of ℓ(z_t, q_s) over global crops s and all other crops t of the image                  (eqs. 1 and 6)

The published code sets the prototypes to length 1 after each step; here `Prototypes` divides by their length.
`optim.freeze_last_layer` keeps the prototypes fixed at the start. For batches with fewer images than prototypes, a
queue keeps the z of earlier batches. As published, the crops of each size are normalised by themselves in the backbone,
and all crops together in the head.

Shapes: B images, G = 2 global and L local crops each, P outputs, K prototypes, Q rows of each queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import Facts, option, option_if
from data_pipeline.parts.part import About
from data_pipeline.views.multicrop import PART_OF, unmasked_crops
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import Crops, inherited, small_data
from pretrain.ops.gather import world
from pretrain.ops.heads import MLPHead, Prototypes
from pretrain.ops.precision import unit, wide
from pretrain.ops.queue import Queue
from pretrain.ops.self_distillation import dino_terms, health
from pretrain.ops.sinkhorn import sinkhorn

GLOBAL = 2  # global crops of each image


def clusters(facts: Facts) -> int:
    """As many as the batch and the queue have images, at most 3,000."""
    return min(3000, facts.batch + facts.section["queue_size"])


def code_temperature(facts: Facts) -> float:
    """0.025 with fewer than 100,000 samples, else 0.05."""
    return 0.025 if small_data(facts) else 0.05


@dataclass
class Config(Crops):
    prototypes: int | Literal["auto"] = option(3000, low=2, auto=(inherited, clusters))  # K
    head_hidden: int = option(2048, low=1)  # width of the head's hidden layer
    head_outputs: int = option(128, low=1)  # P, the width of z
    # whether the head ends with a batch norm without parameters; auto: with fewer than 100,000 samples
    last_norm: bool | Literal["auto"] = option(False, auto=(inherited, small_data))
    temperature: float = option(0.1, above=0)  # τ, of the predictions
    # ε, of the assignments; auto: 0.025 with fewer than 100,000 samples, else 0.05
    code_temperature: float | Literal["auto"] = option(0.05, above=0, auto=code_temperature)
    # Q, the images of earlier batches with which assignments are made: a multiple of data.batch; 0: none
    queue_size: int = option(0, low=0)
    # step from which the queue is used; it holds random vectors until queue_size / data.batch steps are over
    queue_start: int = option_if(0, "queue_size", unless=0, low=0)
    local_crops: int = option(6, low=0)  # local crops of each image, in addition to two global ones
    global_scale: float = option(0.14, above=0, high=1)  # smallest share of the image's area in a global crop
    # probability of a blur in the first global crop, the second one, and local crops
    blur: list[float] = option(lambda: [0.5, 0.5, 0.5], low=0, high=1)
    # strengths of the colour jitter: brightness, contrast, saturation, hue
    jitter: list[float] = option(lambda: [0.8, 0.8, 0.8, 0.2], low=0)
    solarize: float = option(0.0, low=0, high=1)  # probability, second global crop only

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        heads = {"objective.prototypes": 48, "objective.head_hidden": 64, "objective.head_outputs": 32}
        crops = {"objective.local_size": 16, "objective.local_crops": 2}
        return [{**heads, **crops}, {"objective.queue_size": 32, "objective.queue_start": 1}]


class SwAV(Objective):
    couples_batch = True
    least_batch = 2
    part_of = PART_OF

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        widths = (self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.head = MLPHead(*widths, last_norm=cfg.last_norm)
        self.prototypes = Prototypes(cfg.head_outputs, cfg.prototypes)
        size = cfg.queue_size
        self.queues = nn.ModuleList(Queue(size, cfg.head_outputs) for _ in range(GLOBAL if size else 0))

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return unmasked_crops(cfg, about.image_size, about.patch_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        small = batch["local"].shape[1]  # L
        sizes = [batch["global"], *([batch["local"]] if small else [])]
        features = self.backbone([crops.flatten(0, 1) for crops in sizes])
        z = self.head(torch.cat([f.cls for f in features]))  # [B·G + B·L, P]
        count = len(features[0].cls)
        z_global, z_local = (part.unflatten(0, (len(sizes[0]), -1)) for part in (z[:count], z[count:]))
        q = self.assignments(z_global.detach(), step)  # [B, G, K]
        local, glob = dino_terms(self.prototypes, z_global, z_local, q, self.cfg.temperature)
        return local + glob, health(features[0].cls.detach()[::GLOBAL])

    @torch.no_grad()
    def assignments(self, z: Tensor, step: int) -> Tensor:
        """q [B, G, K] from the head's outputs z [B, G, P] for global crops, in fp32 or wider."""
        rank, ranks = world()
        out, queues = [], list[Any](self.queues) or [None] * GLOBAL
        with torch.autocast(z.device.type, enabled=False):  # bf16 would round z·c to 1/256 before it is divided by ε
            for rows, queue in zip(wide(z).unbind(1), queues, strict=True):
                if queue is not None:
                    queue.hold(unit(rows), step)
                    if step >= self.cfg.queue_start:
                        rows = torch.cat([rows, queue.rows[rank::ranks].to(rows.dtype)])  # this rank's share
                out.append(sinkhorn(self.prototypes(rows), self.cfg.code_temperature)[: len(z)])
        return torch.stack(out, dim=1)

    def after_step(self, step: int) -> None:
        queues: list[Any] = list(self.queues)
        for queue in queues:
            queue.push(step, self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
