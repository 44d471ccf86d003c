"""I-JEPA: from a part of an image, predict the features of other parts, not their pixels (arXiv 2301.08243).

    context: K patches of a large block, without those of the targets;  targets: M blocks B_1, …, B_M of n patches each
    s_x = f_θ(x[context]);   s_y = layer norm (without weights) of f_θ'(x), at the places of each B_i             (§3)
    ŝ_i = g_φ(s_x, mask tokens with the positions of B_i), for each block by itself
    loss = mean over images, blocks, patches and features of smooth L1(ŝ_i − s_y[B_i])
    after each step: θ' ← m θ' + (1 − m) θ

The equation of the paper has squared distances (`loss: l2`); the published code has smooth L1. The target encoder f_θ'
is what is exported. Our ViT has a class token, which no loss uses; the predictor does not see it.

Shapes: B images, N patches, K of the context, M blocks of n patches, D encoder width, E predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.masks import ContextAndTargets
from pretrain.models.layers import Block, LayerNorm, apply_blocks
from pretrain.models.positions import Tables, sincos_table
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options, check_range, momentum
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import pick
from pretrain.ops.precision import wide
from pretrain.ops.self_distillation import health


@dataclass
class Config(Options):
    remedies = {name: "raise objective.momentum" for name in ("feature_std", "rank")}

    target_blocks: int = option(4, low=1)  # M, the number of blocks to predict
    # smallest and largest share of a target block in the area of the image
    target_scale: list[float] = option(lambda: [0.15, 0.2], above=0, high=1)
    target_aspect: list[float] = option(lambda: [0.75, 1.5], above=0)  # range of its height / width
    # smallest and largest share of the square block in which the context lies
    context_scale: list[float] = option(lambda: [0.85, 1.0], above=0, high=1)
    # K / N, the share of the patches that the context has; see data_pipeline/views/masks.py
    context_share: float = option(0.25, above=0, below=1)
    predictor_dim: int = option(384, low=1)  # E, the width of the predictor
    predictor_depth: int = option(12, low=1)  # number of its blocks; published: 6 for ViT-B, 12 for ViT-L and ViT-H
    predictor_heads: int = option(12, low=1)  # number of attention heads in each of these blocks
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"  # the distance; l2: the square of the difference
    crop_scale: float = option(0.3, above=0, high=1)  # smallest share of the image's area in a random crop
    # m, the share of its weights that the target encoder keeps in a step
    momentum: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.996, kind="linear", final=1.0), low=0, high=1, auto=momentum
    )

    def check(self) -> None:
        for key in ("target_scale", "target_aspect", "context_scale"):
            check_range(key, getattr(self, key))

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 2, "context_share": 0.4}
        return [{f"objective.{key}": value for key, value in sizes.items()}, {"objective.loss": "l2"}]


class IJEPA(Objective):
    kept_in_eval = ("target",)  # no drop path
    averaged = {"backbone": "target"}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.target = make_teacher(self.backbone).eval()
        width = self.backbone.embed_dim
        self.embed = nn.Linear(width, cfg.predictor_dim)
        self.mask_token = nn.Parameter(torch.zeros(cfg.predictor_dim))
        self.blocks = nn.ModuleList(Block(cfg.predictor_dim, cfg.predictor_heads) for _ in range(cfg.predictor_depth))
        self.norm = LayerNorm(cfg.predictor_dim, 1e-6)
        self.predict = nn.Linear(cfg.predictor_dim, width)
        self._positions = Tables()  # by grid and device
        std = self.backbone.cfg.initial_std  # as published, that of the encoder
        for part in (self.embed, *self.blocks.modules(), self.predict):
            trunc_normal(part, std)
        nn.init.trunc_normal_(self.mask_token, std=std)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0), flip=0.0)
        side = about.image_size // about.patch_size
        masks = ContextAndTargets(
            (side, side),
            cfg.target_blocks,
            (cfg.target_scale[0], cfg.target_scale[1]),
            (cfg.target_aspect[0], cfg.target_aspect[1]),
            (cfg.context_scale[0], cfg.context_scale[1]),
            max(1, round(side * side * cfg.context_share)),
        )

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            return crops(sample, {"image": augment}, rng) | masks(sample, rng(MASKS))

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, context, target_index = batch["image"], batch["context"], batch["targets"]  # [B, …], [B, K], [B, M, n]
        with torch.no_grad():
            encoded = wide(self.target(images).tokens)  # [B, N, D]
            targets = pick(F.layer_norm(encoded, encoded.shape[-1:]), target_index.flatten(1))  # [B, M·n, D]
        features = self.backbone(images, keep=context)
        prediction = self.predicted(features.tokens, context, target_index, features.grid)  # [B, M·n, D]
        distance = F.smooth_l1_loss if self.cfg.loss == "smooth_l1" else F.mse_loss
        return distance(prediction.to(targets.dtype), targets), health(encoded.mean(1))

    def predicted(self, encoded: Tensor, context: Tensor, target_index: Tensor, grid: tuple[int, int]) -> Tensor:
        """The predictions [B, M·n, D] for the patches `target_index` [B, M, n], from the encoded patches `encoded`
        [B, K, D] at `context` [B, K]."""
        positions = self._positions.of(
            (grid, encoded.device), lambda: sincos_table(self.cfg.predictor_dim, grid, encoded.device)
        )
        blocks, patches = target_index.shape[1:]
        context_tokens = self.embed(encoded)
        dtype = context_tokens.dtype
        context_tokens = context_tokens + positions[context].to(dtype)  # [B, K, E]
        context_tokens = context_tokens.unsqueeze(1).expand(-1, blocks, -1, -1)  # [B, M, K, E]
        mask_tokens = self.mask_token.to(dtype) + positions[target_index].to(dtype)  # [B, M, n, E]
        # [B·M, K + n, E]: a block does not see the other ones
        x = torch.cat([context_tokens, mask_tokens], dim=2).flatten(0, 1)
        x = apply_blocks(self.blocks, x)[:, -patches:]
        return self.predict(self.norm(x)).unflatten(0, (-1, blocks)).flatten(1, 2)

    def after_step(self, step: int) -> None:
        ema_update(self.target, self.backbone, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.target, "mean")}  # as published, the mean of the patches
