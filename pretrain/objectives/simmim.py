"""SimMIM: a ViT sees an image with masked squares, and a linear layer predicts their pixels (arXiv 2111.09886).

    mask: a share `mask_ratio` of the squares of `mask_size` pixels, drawn uniformly
    z = encoder(patches, a learned token in place of the masked ones);   ŷ = W z + b, the pixels of a patch     (§3)
    loss = mean over masked patches, their pixels and channels of |ŷ − y|,   y = normalised pixels of the image (eq. 1)

Shapes: B images, N patches, M masked, D encoder width, p pixels per patch side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.masks import square_mask
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.image_rows import reconstructions
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import mask_at, patchify, pick


@dataclass
class Config(Options):
    mask_ratio: float = option(0.6, above=0, high=1)  # share of the squares that are masked, rounded up
    mask_size: int = option(32, low=1)  # side of a square in pixels: a multiple of the patch that divides the image
    crop_scale: float = option(0.67, above=0, high=1)  # smallest share of the image's area in a random crop

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.mask_size": 16}]


class SimMIM(Objective):
    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(mask_token=True, local_cls_norm=False)  # there are no local crops
        pixels = self.backbone.patch_size**2 * self.backbone.cfg.in_channels  # type: ignore[union-attr, operator]
        self.predict = nn.Linear(self.backbone.embed_dim, pixels)
        trunc_normal(self.predict)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        if cfg.mask_size % about.patch_size or about.image_size % cfg.mask_size:
            raise ValueError(
                f"objective.mask_size = {cfg.mask_size}: must be a multiple of the patch, {about.patch_size} pixels, and"
                f" divide the image, {about.image_size} pixels; write objective.mask_size={about.patch_size}"
            )
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0))
        squares, cells = about.image_size // cfg.mask_size, cfg.mask_size // about.patch_size
        count = math.ceil(squares**2 * cfg.mask_ratio)

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            mask = square_mask((squares, squares), cells, count, rng(MASKS))
            return crops(sample, {"image": augment}, rng) | {"masked": np.flatnonzero(mask)}  # [M]

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        target = patchify(batch["image"], self.backbone.patch_size)  # [B, N, p·p·3]
        prediction = self.predicted(batch["image"], batch["masked"], target.shape[1])
        return F.l1_loss(prediction.to(target.dtype), pick(target, batch["masked"])), {}

    def predicted(self, images: Tensor, masked: Tensor, patches: int) -> Tensor:
        """The pixels [B, M, p·p·3] of the patches at `masked` [B, M], of which the encoder does not see any."""
        tokens = self.backbone(images, mask=mask_at(masked, patches)).tokens  # [B, N, D]
        return self.predict(pick(tokens, masked))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}  # no loss trains the class token directly

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """uint8 [3, B·H, 3·W]: the image, what the encoder sees, and the image with predicted patches."""
        images, masked, size = batch["image"][:6], batch["masked"][:6], self.backbone.patch_size
        patches = images[0, 0].numel() // size**2
        return {"reconstructions": reconstructions(images, masked, self.predicted(images, masked, patches), size)}
