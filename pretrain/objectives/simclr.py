"""SimCLR: find the other view of an image among all views of the batch by its similarity (arXiv 2002.05709).

    z_a, z_b = g(f(t_a(x))), g(f(t_b(x)))
    loss = −log softmax_j(cos(z_i, z_j) / temperature) at the other view of image i, mean over all views

Shapes: B images, two views each, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import Augment, Rng, crops
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.contrastive import nt_xent
from pretrain.ops.heads import ProjectionHead


@dataclass
class Config(Options):
    temperature: float = option(0.1, above=0)  # cosine similarities are divided by it before the softmax
    head_hidden: int = option(2048, low=1)  # width of the projection head's hidden layer
    head_outputs: int = option(128, low=1)  # width of the embeddings that are compared
    crop_scale: float = option(0.08, above=0, high=1)  # smallest share of the image's area in a random crop
    color: float = 1.0  # strength s of the colour jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s)
    blur: float = option(0.5, low=0, high=1)  # probability of a Gaussian blur

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.head_hidden": 64, "objective.head_outputs": 32}]


class SimCLR(Objective):
    couples_batch = True
    least_batch = 2  # a single image has no negatives: its loss is 0

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.head = ProjectionHead(self.backbone.embed_dim, cfg.head_hidden, cfg.head_outputs)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        s = cfg.color
        jitter = (0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0), jitter=jitter, gray=0.2, blur=cfg.blur)

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            return crops(sample, {"image": [augment] * 2}, rng)  # [2, 3, H, W]

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(batch["image"].flatten(0, 1)).cls  # [2·B, D]: one forward for both views
        z = self.head(features).unflatten(0, (-1, 2))  # [B, 2, outputs]
        return nt_xent(z[:, 0], z[:, 1], self.cfg.temperature), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
