"""Masked autoencoder: a ViT encodes a quarter of the patches, a small decoder predicts the rest (arXiv 2111.06377).

    keep ~ uniform subset of (1 − mask_ratio)·N patches
    z = encoder(image[keep]);   ŷ = decoder(z at kept places, mask token elsewhere)
    loss = mean over dropped patches of ‖ŷ − y‖² / (p·p·3),   y = pixels, normalised by each patch's mean and variance

Shapes: B images, N patches, K kept, M = N − K dropped, D encoder width, E decoder width, p pixels per patch side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from pretrain.models.layers import Block, LayerNorm, apply_blocks
from pretrain.models.positions import Tables, sincos_table
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import MaskedAutoencoder
from pretrain.ops.image_rows import reconstructions
from pretrain.ops.init import xavier
from pretrain.ops.patchify import complement, patchify, pick


@dataclass
class Config(MaskedAutoencoder):
    crop_scale: float = option(0.2, above=0, high=1)  # smallest share of the image's area in a random crop


class MAE(Objective):
    backbone: Any

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.embed = nn.Linear(self.backbone.embed_dim, cfg.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.decoder_dim))
        self.blocks = nn.ModuleList(Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth))
        self.norm = LayerNorm(cfg.decoder_dim, 1e-6)
        self._positions = Tables()  # by grid and device
        self.predict = nn.Linear(cfg.decoder_dim, self.backbone.patch_size**2 * self.backbone.cfg.in_channels)
        for part in (self.embed, self.blocks, self.predict):
            xavier(part)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        patches = (about.image_size // about.patch_size) ** 2
        kept = int(patches * (1 - cfg.mask_ratio))
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0))

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            return crops(sample, {"image": augment}, rng) | {"keep": rng(MASKS).random(patches).argsort()[:kept]}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        prediction, dropped = self.reconstruct(batch["image"], batch["keep"])
        target = pick(self.target(batch["image"]), dropped)  # [B, M, p·p·3]
        loss = (prediction.to(target.dtype) - target).square().mean()
        return loss, {}

    def reconstruct(self, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(predictions for the dropped patches [B, M, p·p·3], their indices [B, M])."""
        features = self.backbone(images, keep=keep)
        positions = self.positions(features.grid, images.device)
        dropped = complement(keep, len(positions))
        seen = self.embed(features.tokens)
        seen = seen + positions[keep].to(seen.dtype)  # [B, K, E]
        unseen = self.mask_token.to(seen.dtype) + positions[dropped].to(seen.dtype)  # [B, M, E]
        cls = self.embed(features.cls.unsqueeze(1))  # [B, 1, E]; the position of the class token is zero
        x = torch.cat([cls, seen, unseen], dim=1)  # [B, 1 + N, E] in any order, since positions have been added
        x = apply_blocks(self.blocks, x)
        return self.predict(self.norm(x[:, -dropped.shape[1] :])), dropped

    def positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The decoder's fixed positions [N, E], computed once for each grid and device."""
        return self._positions.of((grid, device), lambda: sincos_table(self.cfg.decoder_dim, grid, device))

    def target(self, images: Tensor) -> Tensor:
        """Pixels of every patch [B, N, p·p·3], normalised per patch with the unbiased variance."""
        target = patchify(images, self.backbone.patch_size)
        if self.cfg.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}  # no loss trains the class token directly

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """uint8 [3, B·H, 3·W]: the image, what the encoder sees, and the image with predicted patches."""
        images, keep = batch["image"][:6], batch["keep"][:6]
        size = self.backbone.patch_size
        prediction, dropped = self.reconstruct(images, keep)
        if self.cfg.norm_pix:  # undo the normalisation with the true patch's mean and variance
            true = pick(patchify(images, size), dropped)
            prediction = prediction.to(true.dtype) * (true.var(-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction + true.mean(-1, keepdim=True)
        return {"reconstructions": reconstructions(images, dropped, prediction, size)}
