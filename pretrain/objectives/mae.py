"""Masked autoencoder: a ViT sees a quarter of the patches, a small decoder paints the rest (arXiv 2111.06377).

    keep ~ uniform subset of (1 − mask_ratio)·N patches
    z = encoder(image[keep]);   ŷ = decoder(z at kept places, mask token elsewhere)
    loss = mean over dropped patches of ‖ŷ − y‖² / (p·p·3),   y = pixels, each patch normalised by its own mean and variance

Shapes: B images, N patches, K kept, M = N − K dropped, D encoder width, E decoder width, p pixels per patch side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.views import MASKS, Augment, crops
from pretrain.config import Section
from pretrain.models.layers import Block, trunc_normal
from pretrain.models.positions import sincos_table
from pretrain.objectives.base import Objective
from pretrain.ops.patchify import complement, patchify, unpatchify


@dataclass
class Config(Section):
    mask_ratio: float = 0.75
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    norm_pix: bool = True  # predict pixels normalised per patch
    crop_scale: float = 0.2  # smallest share of the image's area in a random crop


class MAE(Objective):
    pool = "mean"  # the class token gets no loss of its own

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        if cfg.decoder_depth < 1:
            raise ValueError(f"objective.decoder_depth = {cfg.decoder_depth}: must be 1 or more")
        self.backbone = backbone()
        self.embed = nn.Linear(self.backbone.embed_dim, cfg.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.decoder_dim))
        self.blocks = nn.ModuleList(Block(cfg.decoder_dim, cfg.decoder_heads) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(cfg.decoder_dim, 1e-6)
        self.predict = nn.Linear(cfg.decoder_dim, self.backbone.patch_size**2 * self.backbone.cfg.in_channels)
        for part in (self.embed, self.predict):
            trunc_normal(part)
        self.blocks.apply(trunc_normal)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def views(cfg, image_size, patch_size):
        patches = (image_size // patch_size) ** 2
        kept = int(patches * (1 - cfg.mask_ratio))
        augment = Augment(image_size, scale=(cfg.crop_scale, 1.0))

        def view(sample, rng):
            return crops(sample, {"image": augment}, rng) | {"keep": rng(MASKS).random(patches).argsort()[:kept]}

        return view

    def forward(self, batch, step):
        prediction, dropped = self.reconstruct(batch["image"], batch["keep"])
        target = self.target(batch["image"])  # [B, N, p·p·3]
        target = target.gather(1, dropped.unsqueeze(-1).expand(-1, -1, target.shape[-1]))
        loss = (prediction.to(target.dtype) - target).square().mean()
        return loss, {}

    def reconstruct(self, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(predictions for the dropped patches [B, M, p·p·3], their indices [B, M])."""
        features = self.backbone(images, keep=keep)
        positions = sincos_table(self.cfg.decoder_dim, features.grid).to(images)  # [N, E]
        dropped = complement(keep, len(positions))
        seen = self.embed(features.tokens)
        seen = seen + positions[keep].to(seen.dtype)  # [B, K, E]
        unseen = self.mask_token.to(seen.dtype) + positions[dropped].to(seen.dtype)  # [B, M, E]
        cls = self.embed(features.cls.unsqueeze(1))  # its position is zero
        x = torch.cat([cls, seen, unseen], dim=1)  # attention does not care for the order
        b, n, _ = x.shape
        flat = x.flatten(0, 1)
        for block in self.blocks[:-1]:
            flat = block(flat, [(b, n)])
        flat = self.blocks[-1](
            flat, [(b, n)], last=dropped.shape[1]
        )  # only these are predicted: 2 % of a ViT-S step saved
        return self.predict(self.norm(flat.view(b, dropped.shape[1], -1))), dropped

    def target(self, images: Tensor) -> Tensor:
        """Pixels of every patch [B, N, p·p·3], normalised per patch with the unbiased variance."""
        target = patchify(images, self.backbone.patch_size)
        if self.cfg.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    def encoder(self):
        return self.backbone

    @torch.no_grad()
    def pictures(self, batch):
        """Rows of: image, what the encoder sees, image with the dropped patches painted in. Contrast is set per row, as values are normalised."""
        images, keep = batch["image"][:6], batch["keep"][:6]
        size = self.backbone.patch_size
        grid = (images.shape[-2] // size, images.shape[-1] // size)
        pixels = patchify(images, size)
        prediction, dropped = self.reconstruct(images, keep)
        prediction = prediction.to(pixels.dtype)
        index = dropped.unsqueeze(-1).expand(-1, -1, pixels.shape[-1])
        if self.cfg.norm_pix:  # the prediction is of normalised pixels: give it back the patch's own mean and contrast
            true = pixels.gather(1, index)
            prediction = prediction * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        seen, painted = (pixels.scatter(1, index, fill) for fill in (pixels.new_zeros(index.shape), prediction))
        rows = torch.stack([unpatchify(x, size, grid) for x in (pixels, seen, painted)], dim=1)  # [B, 3, 3, H, W]
        low, high = rows[:, 0].amin((1, 2, 3), keepdim=True), rows[:, 0].amax((1, 2, 3), keepdim=True)
        rows = rows[:, :, :3] if rows.shape[2] >= 3 else rows[:, :, :1].expand(-1, -1, 3, -1, -1)
        rows = ((rows - low.unsqueeze(1)) / (high - low).unsqueeze(1)).clamp(0, 1) * 255
        return {"reconstructions": rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).byte()}  # [3, B·H, 3·W]
