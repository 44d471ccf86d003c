"""VQ-VAE: an image is encoded as a grid of discrete codes, from which a decoder restores it (arXiv 1711.00937).

    z_e = f(x);   k_i = argmin_j ‖z_e,i − e_j‖;   z_q,i = e_{k_i} at each place i of the grid               (eqs. 1, 2)
    loss = mean (x − g(z_q))² + β · mean (z_e − sg[z_q])²                                                  (eq. 3)
    the decoder's gradient of z_q is that of z_e (straight-through):  g gets z_e + sg[z_q − z_e]

The likelihood of eq. 3 is that of a normal distribution with a fixed variance. Its term for the codebook,
‖sg[z_e] − z_q‖², is replaced by the moving averages of appendix A.1, which the paper describes but has not used for its
experiments: each e_j is the mean of the z_e that were assigned to it. The paper says nothing about codes without use, of
which there are many if the encoder's outputs were similar at first; `restart_below` replaces them by outputs of the
encoder at random places. The encoder f is the recipe's model, and z_e are its tokens, with no further layer: those of a
ResNet come from a ReLU, while the codes are drawn from a normal distribution at first. The decoder is that of the paper:
residual blocks, then transposed convolutions.

The export is the tokenizer: the encoder, with the codebook in tensors.safetensors. The objective `beit` reads it.

Shapes: B images, C channels, N = h·w places, D encoder width, K codes, E decoder width, p = 2ⁿ pixels per place.
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
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.codebook import Codebook
from pretrain.ops.image_rows import side_by_side
from pretrain.ops.patchify import pick
from pretrain.ops.precision import wide
from pretrain.ops.upsampling import doublings, upsampling


@dataclass
class Config(Options):
    codebook_size: int = option(512, low=2)  # K, the number of codes
    codebook_decay: float = option(0.99, low=0, below=1)  # γ of the moving averages of the codebook
    commitment_weight: float = option(0.25, low=0)  # β: of the distance between the encoder's outputs and their codes
    # a code that was used less often than this share of the codes' mean is replaced by an output of the encoder; 0: none is
    restart_below: float = option(0.0, low=0, below=1)
    decoder_dim: int = option(256, low=1)  # E, width of the decoder
    decoder_depth: int = option(2, low=0)  # number of residual blocks of the decoder
    crop_scale: float = option(0.2, above=0, high=1)  # smallest share of the image's area in a random crop

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"objective.codebook_size": 32, "objective.decoder_dim": 16, "objective.decoder_depth": 1}
        return [{**sizes, "objective.restart_below": 0.03}]


class DecoderBlock(nn.Sequential):
    """x + 1×1 convolution of a 3×3 convolution, each after a ReLU (§4.1)."""

    def __init__(self, dim: int):
        super().__init__(nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class VQVAE(Objective):
    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        steps = doublings(self.backbone.patch_size, "model.patch_size")
        channels: int = self.backbone.cfg.in_channels  # type: ignore[union-attr, assignment]
        self.codebook = Codebook(cfg.codebook_size, self.backbone.embed_dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(self.backbone.embed_dim, cfg.decoder_dim, 3, padding=1),
            *(DecoderBlock(cfg.decoder_dim) for _ in range(cfg.decoder_depth)),
            nn.ReLU(),
            upsampling([cfg.decoder_dim] * steps + [channels], norm=False),
        )

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0))
        places = (about.image_size // about.patch_size) ** 2

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            # n places of the image whose z_e may replace codes without use, so many that a batch has enough for all K
            count, draw = min(places, math.ceil(cfg.codebook_size / sample["batch"])), rng(MASKS)
            candidates = draw.choice(places, count, replace=False)  # int64 [n]
            order = draw.integers(1 << 62, size=count)  # int64 [n]: random numbers; the lowest ones replace first
            return crops(sample, {"image": augment}, rng) | {"candidates": candidates, "order": order}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        restored, z, codes, vectors = self.reconstruct(batch["image"])
        candidates = pick(z, batch["candidates"]).flatten(0, 1)  # [B·n, D]
        self.codebook.hold(z.flatten(0, 1), codes.flatten(), candidates, batch["order"].flatten(), step)
        reconstruction = F.mse_loss(restored, batch["image"])
        commitment = F.mse_loss(z, vectors)
        logs = {"reconstruction": reconstruction.detach(), "commitment": commitment.detach()}
        logs["perplexity"] = self.codebook.perplexity()
        return reconstruction + self.cfg.commitment_weight * commitment, logs

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(restored images [B, C, H, W], z_e [B, N, D], codes [B, N], their vectors [B, N, D])."""
        features = self.backbone(images)
        z = wide(features.tokens)
        codes, vectors = self.codebook(z)
        z_q = z + (vectors - z).detach()  # the gradient goes straight through
        grid = z_q.transpose(1, 2).unflatten(2, features.grid)  # [B, D, h, w]
        return wide(self.decoder(grid)), z, codes, vectors

    def after_step(self, step: int) -> None:
        self.codebook.update(step, self.cfg.codebook_decay, self.cfg.restart_below, self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean", {"codebook": self.codebook.vectors})}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """uint8 [3, B·H, 2·W]: images, and what the decoder restores from their codes."""
        images = batch["image"][:6]
        return {"reconstructions": side_by_side([images, self.reconstruct(images)[0]])}
