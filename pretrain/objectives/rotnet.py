"""RotNet: a network recognises by how many quarter turns an image was rotated (arXiv 1803.07728).

    X^y = g(X | y): image X rotated counter-clockwise by y · 90°, y = 0 … 3
    loss = −1/4 Σ_y log softmax(W f(X^y) + b)_y, mean over images                                      (eqs. 2 and 3)

All four rotations of an image are in the same batch, as published. The data workers rotate the pixels. The paper
classifies the last feature map of a convolutional network; here a linear layer reads the feature that `eval` reads, the
pooled map of a ResNet or the class token of a ViT.

Shapes: B images, four rotations each, D encoder width, C channels, S pixels per side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import Augment, Rng, crops
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.cross_entropy import classification
from pretrain.ops.init import trunc_normal
from pretrain.ops.precision import wide

TURNS = 4


@dataclass
class Config(Options):
    # smallest share of the image's area in a random crop; the paper crops 224 pixels of an image whose short side has 256
    crop_scale: float = option(0.77, above=0, high=1)
    flip: float = option(0.5, low=0, high=1)  # probability of a horizontal flip, before the rotations


class RotNet(Objective):
    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.head = nn.Linear(self.backbone.embed_dim, TURNS)
        trunc_normal(self.head)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0), flip=cfg.flip)

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            image = crops(sample, {"image": augment}, rng)["image"]  # [C, S, S]
            return {"image": np.stack([np.rot90(image, turns, (1, 2)) for turns in range(TURNS)])}  # [4, C, S, S]

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"]
        logits = wide(self.head(self.backbone(images.flatten(0, 1)).cls))  # [B·4, 4]
        turns = torch.arange(TURNS, device=images.device).repeat(len(images))  # [B·4]
        return classification(logits, turns)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
