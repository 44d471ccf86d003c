"""data2vec: at masked patches, predict what a moving average of the network makes of the whole image (arXiv 2202.03555).

    ŷ = W f_θ(x with a learned token in place of masked patches) + b
    y = 1/K Σ_{l > L − K} â_l,   a_l: outputs of block l of f_θ'(x),  â_l: their layer norm without weights    (§3.3)
    loss = mean over masked patches and features of  (ŷ − y)² / (2 β) where |ŷ − y| ≤ β,  else |ŷ − y| − β / 2  (§3.4)
    after each step: θ' ← τ θ' + (1 − τ) θ                                                                     (§3.2)

Masks are the blocks of BEiT, of 60 % of the patches in every image. A backbone returns the outputs of its blocks through
its last norm; the weights of that norm stay as they were at the start (1 and 0), so that it is the norm of the formula.
The linear layer that follows the student's norm has weights enough.

Shapes: B images, N patches, M masked ones of each image, D encoder width, K of L blocks.
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
from data_pipeline.views.masks import block_mask
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import MaskedBlocks, momentum
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import mask_at, pick
from pretrain.ops.precision import wide
from pretrain.ops.self_distillation import health


@dataclass
class Config(MaskedBlocks):
    remedies = {name: "raise objective.momentum" for name in ("feature_std", "rank")}

    target_layers: int = option(6, low=1)  # K, the number of last blocks whose outputs are averaged
    quadratic_below: float = option(2.0, above=0)  # β, the difference from which on the loss is linear
    mask_ratio: float = option(0.6, above=0, below=1)  # share of the patches that are masked
    # τ, the share of its weights that the teacher keeps in a step
    momentum: Literal["auto"] | Schedule = option(lambda: Schedule(0.9998), low=0, high=1, auto=momentum)

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.target_layers": 1, "objective.smallest_block": 2}]


class Data2Vec(Objective):
    kept_in_eval = ("teacher", "backbone.norm")  # no drop path; frozen
    averaged = {"backbone": "teacher"}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone: Any = backbone(mask_token=True, local_cls_norm=False)  # there are no local crops
        depth = len(self.backbone.blocks)
        if cfg.target_layers > depth:
            raise ValueError(
                f"objective.target_layers = {cfg.target_layers}: the model has {depth} blocks;"
                f" write objective.target_layers={depth}, or fewer"
            )
        self.backbone.norm.requires_grad_(False)
        self.teacher = make_teacher(self.backbone).eval()
        self.predict = nn.Linear(self.backbone.embed_dim, self.backbone.embed_dim)
        trunc_normal(self.predict)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        side = about.image_size // about.patch_size
        count = cfg.masked_patches(side)  # M
        augment = Augment(about.image_size, (cfg.crop_scale, 1.0), jitter=tuple(cfg.jitter), jitter_p=1.0)

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            mask = block_mask((side, side), count, rng(MASKS), cfg.smallest_block)
            return crops(sample, {"image": augment}, rng) | {"masked": np.flatnonzero(mask)}  # [M]

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, masked, layers = batch["image"], batch["masked"], self.cfg.target_layers
        with torch.no_grad():
            normed = wide(self.teacher(images, layers=layers).tokens).unflatten(-1, (layers, -1))  # [B, N, K, D]
            targets = pick(normed.mean(2), masked)  # [B, M, D]
        tokens = self.backbone(images, mask=mask_at(masked, normed.shape[1])).tokens  # [B, N, D]
        prediction = self.predict(pick(tokens, masked)).to(targets.dtype)
        return F.smooth_l1_loss(prediction, targets, beta=self.cfg.quadratic_below), health(normed[:, :, -1].mean(1))

    def after_step(self, step: int) -> None:
        ema_update(self.teacher, self.backbone, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}  # no loss trains the class token directly
