"""VideoMAE: reconstruct the 90 % of a clip that the encoder does not see (arXiv 2203.12602).

    x_keep = cubes of f frames and p×p pixels at ⌈10 %⌉ of the places of a frame, the same in all frames (tubes)  (§3.3)
    ŷ = g_φ(f_θ(x_keep), mask tokens with positions)                     a narrow, shallow decoder
    loss = mean over masked cubes of ‖ŷ − y‖² / (f·p·p·3),   y = pixels of a cube, each channel minus its mean in the
           cube and divided by (its deviation there + 10⁻⁶)                                                       (§3.1)

The published code computes y from pixels between 0 and 1; here they are normalised (`data.mean`, `data.std`), which
changes y only through the constant 10⁻⁶. Its crops have one of four sizes; here `crop_scale` is a range. With
`clips_per_video` above 1 a video is decoded once for several clips (2205.09113).

Shapes: B samples of n clips, F frames, N cubes, K kept, M = N − K masked, D encoder width, E decoder width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.parts.video_clip import Clip
from data_pipeline.views.augmentations import MASKS, Augment, Rng
from data_pipeline.views.clip_masks import at_all_times
from data_pipeline.views.clip_views import clip_crops
from pretrain.models.layers import Block, LayerNorm, apply_blocks
from pretrain.models.positions import Tables, clip_table, sequence_table
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.image_rows import side_by_side
from pretrain.ops.init import xavier
from pretrain.ops.patchify import complement, pick, tubelets, untubelets

PICTURED = 8  # frames of a clip in a picture


@dataclass
class Config(Options):
    mask_ratio: float = option(0.9, above=0, below=1)  # share of the tubes that the encoder does not see
    decoder_dim: int = option(384, low=1)  # width of the decoder; published: half of the encoder's
    decoder_depth: int = option(4, low=1)  # number of blocks of the decoder
    decoder_heads: int = option(6, low=1)  # number of attention heads in each of these blocks
    norm_pix: bool = True  # whether the pixels to predict are normalised per cube
    clips_per_video: int = option(1, low=1)  # n, the number of clips of each video in a batch
    crop_scale: float = option(0.5, above=0, high=1)  # smallest share of the frame's area in a random crop
    flip: float = option(0.5, low=0, high=1)  # probability of a horizontal flip; 0 where left and right matter

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"model.dim": 32, "model.depth": 2, "model.heads": 2, "model.frames": 4}
        decoder = {"objective.decoder_dim": 16, "objective.decoder_depth": 1, "objective.decoder_heads": 2}
        return [
            {"model": "videomae_micro", **sizes, **decoder},
            {"objective.clips_per_video": 2, "objective.norm_pix": False},
        ]


class VideoMAE(Objective):
    parts = {"clip": Clip()}
    backbone: Any

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        model = self.backbone.cfg
        self.embed = nn.Linear(model.dim, cfg.decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.decoder_dim))
        blocks = (Block(cfg.decoder_dim, cfg.decoder_heads, key_bias=False) for _ in range(cfg.decoder_depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(cfg.decoder_dim, 1e-6)
        self.predict = nn.Linear(cfg.decoder_dim, model.tubelet * model.patch_size**2 * model.in_channels)
        self._positions = Tables()  # by grid and device
        for part in (self.embed, self.predict, self.blocks, *([] if self.backbone.loaded else [self.backbone])):
            xavier(part)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        places, times = (about.image_size // about.patch_size) ** 2, about.frames // about.tubelet
        kept = places - int(places * cfg.mask_ratio)
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0), flip=cfg.flip)

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            chosen = [np.sort(rng(MASKS + n).permutation(places)[:kept]) for n in range(cfg.clips_per_video)]
            keep = np.stack([at_all_times(times, places, one) for one in chosen])  # [n, K]
            return clip_crops(sample, augment, cfg.clips_per_video, rng) | {"keep": keep}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clips, keep = batch["clip"].flatten(0, 1), batch["keep"].flatten(0, 1)  # [B·n, F, C, H, W], [B·n, K]
        prediction, masked = self.reconstruct(clips, keep)
        target = pick(self.target(clips), masked)  # [B·n, M, f·p·p·C]
        return (prediction.to(target.dtype) - target).square().mean(), {}

    def reconstruct(self, clips: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """(predictions for the masked cubes [B·n, M, f·p·p·C], their numbers [B·n, M])."""
        features = self.backbone(clips, keep=keep)
        t, h, w = features.grid
        masked = complement(keep, t * h * w)
        positions = self.positions((t, h, w), clips.device)
        seen = self.embed(features.tokens)
        seen = seen + positions[keep].to(seen.dtype)  # [B·n, K, E]
        unseen = self.mask_token.to(seen.dtype) + positions[masked].to(seen.dtype)  # [B·n, M, E]
        x = apply_blocks(self.blocks, torch.cat([seen, unseen], dim=1))
        return self.predict(self.norm(x[:, keep.shape[1] :])), masked

    def positions(self, grid: tuple[int, int, int], device: torch.device) -> Tensor:
        """The decoder's fixed positions [N, E]: as published, those of a token's number, if the encoder's positions are of
        this kind; otherwise those of its time, row and column."""

        def make() -> Tensor:
            if self.backbone.cfg.positions == "sequence":
                return sequence_table(self.cfg.decoder_dim, math.prod(grid), device)
            return clip_table(self.cfg.decoder_dim, grid, device)

        return self._positions.of((grid, device), make)

    def target(self, clips: Tensor) -> Tensor:
        """Pixels of every cube [B·n, N, f·p·p·C], each channel normalised per cube with the unbiased variance."""
        model = self.backbone.cfg
        cubes = tubelets(clips, model.tubelet, model.patch_size)
        return normalised(cubes, model.in_channels)[0] if self.cfg.norm_pix else cubes

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """uint8 [3, 8·H, 3·W]: frames of the first clip, one below the other: the frame, what the encoder sees, and the
        frame with predicted cubes."""
        clips, keep = batch["clip"][:1].flatten(0, 1)[:1], batch["keep"][:1].flatten(0, 1)[:1]
        model = self.backbone.cfg
        prediction, masked = self.reconstruct(clips, keep)
        cubes = tubelets(clips, model.tubelet, model.patch_size)
        prediction = prediction.to(cubes.dtype)
        if self.cfg.norm_pix:  # undo the normalisation with the true mean and deviation
            _, mean, deviation = normalised(pick(cubes, masked), model.in_channels)
            prediction = (prediction.unflatten(-1, (-1, model.in_channels)) * deviation + mean).flatten(2)
        index = masked.unsqueeze(-1).expand_as(prediction)
        grid = (clips.shape[1] // model.tubelet, *(side // model.patch_size for side in clips.shape[-2:]))
        shown = [
            untubelets(x, model.tubelet, model.patch_size, grid)[0, :PICTURED]
            for x in (cubes, cubes.scatter(1, index, 0.0), cubes.scatter(1, index, prediction))
        ]
        return {"reconstructions": side_by_side(shown)}


def normalised(cubes: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cubes [B, N, q·C] whose channels are normalised, their means and their deviations + 10⁻⁶, [B, N, 1, C])."""
    pixels = cubes.unflatten(-1, (-1, channels))  # [B, N, q, C]
    mean, deviation = pixels.mean(-2, keepdim=True), pixels.var(-2, keepdim=True).sqrt() + 1e-6
    return ((pixels - mean) / deviation).flatten(2), mean, deviation
