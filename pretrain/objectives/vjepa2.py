"""V-JEPA 2: from a part of a clip, predict the features of the rest, not its pixels (arXiv 2506.09985; 2404.08471).

    for each of two masks, of 8 small and of 2 large blocks of places at all times:                       (2404.08471 §3)
        y = layer norm (without weights) of f_θ'(x);  the targets y[M] are in the blocks, the context x[K] outside
        ŷ = g_φ(f_θ(x[K]), a mask token at each target), both with rotary positions in time, row and column
        loss = mean over clips, targets and features of |ŷ − y[M]|                                         (eq. 1)
    the loss is the mean over the masks;  after each step: θ' ← m θ' + (1 − m) θ

`context_loss` adds the loss on the context of V-JEPA 2.1 (2603.14482): λ times the mean of |ŷ' − y[K]| / √d, where ŷ'
are other outputs of g_φ, at the context's tokens, and d is the distance from the nearest target in places. The other
changes of 2.1 (features of several blocks as targets, tokenizers for each modality) are not part of it.

An image is a clip whose frames are equal, so that `data.mix` may hold images, as in the paper. The encoder f_θ' is what
is exported. Shapes: B clips, N tokens, K of the context, M targets, D encoder width, E predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option, option_if
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.parts.video_clip import Clip
from data_pipeline.views.augmentations import MASKS, Augment, Rng
from data_pipeline.views.clip_masks import BlocksOverTime
from data_pipeline.views.clip_views import clip_crops
from pretrain.models.layers import Features, LayerNorm
from pretrain.models.positions import Tables, clip_rotation
from pretrain.models.video_vit import rotary_block, rotation_at
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

    mask_blocks: list[int] = option(lambda: [8, 2], low=1)  # number of blocks of each mask
    # share of the frame's area of a block, for each mask
    mask_scale: list[float] = option(lambda: [0.15, 0.7], above=0, below=1)
    mask_aspect: list[float] = option(lambda: [0.75, 1.5], above=0)  # range of the height / width of a block
    predictor_dim: int = option(384, low=1)  # E, the width of the predictor
    predictor_depth: int = option(12, low=1)  # number of its blocks
    predictor_heads: int = option(12, low=1)  # number of attention heads in each of these blocks
    context_loss: bool = False  # whether the features of the context are predicted, too (V-JEPA 2.1)
    # λ, the weight of the loss on the context
    context_weight: Schedule = option_if(lambda: Schedule(0.5, start=0.0, warmup=0.1), "context_loss", True, low=0)
    crop_scale: float = option(0.3, above=0, high=1)  # smallest share of the frame's area in a random crop
    flip: float = option(0.5, low=0, high=1)  # probability of a horizontal flip; 0 where left and right matter
    # m, the share of its weights that the target encoder keeps in a step
    momentum: Literal["auto"] | Schedule = option(lambda: Schedule(0.99925), low=0, high=1, auto=momentum)

    def check(self) -> None:
        check_range("mask_aspect", self.mask_aspect)
        if not self.mask_blocks or len(self.mask_blocks) != len(self.mask_scale):
            raise ValueError(
                f"objective.mask_scale = {self.mask_scale}: write one number for each mask of"
                f" objective.mask_blocks = {self.mask_blocks}"
            )

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"model.dim": 32, "model.depth": 2, "model.heads": 2, "model.frames": 4}
        predictor = {"predictor_dim": 16, "predictor_depth": 1, "predictor_heads": 2}
        objective = {f"objective.{key}": value for key, value in predictor.items()}
        return [{"model": "vjepa2_micro", **sizes, **objective}, {"objective.context_loss": True}]


class VJEPA2(Objective):
    parts = {"clip": Clip()}
    kept_in_eval = ("target",)  # no drop path
    averaged = {"backbone": "target"}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone()
        self.target = make_teacher(self.backbone).eval()
        width, masks = self.backbone.embed_dim, len(cfg.mask_blocks)
        self.embed = nn.Linear(width, cfg.predictor_dim)
        self.mask_tokens = nn.Parameter(torch.zeros(masks, cfg.predictor_dim))  # one for each mask
        blocks = (rotary_block(cfg.predictor_dim, cfg.predictor_heads) for _ in range(cfg.predictor_depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(cfg.predictor_dim, 1e-6)
        self.predict = nn.Linear(cfg.predictor_dim, width)
        self.predict_context = nn.Linear(cfg.predictor_dim, width) if cfg.context_loss else None
        self._rotations = Tables()  # by grid and device
        std = self.backbone.cfg.initial_std  # as published, that of the encoder
        for part in (self.embed, self.predict, self.predict_context, *self.blocks.modules()):
            if part is not None:
                trunc_normal(part, std)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        side = about.image_size // about.patch_size
        grid = (about.frames // about.tubelet, side, side)
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0), flip=cfg.flip)
        aspect = (cfg.mask_aspect[0], cfg.mask_aspect[1])
        masks = [
            BlocksOverTime(grid, count, (scale, scale), aspect)
            for count, scale in zip(cfg.mask_blocks, cfg.mask_scale, strict=True)
        ]

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            out = {"clip": clip_crops(sample, augment, 1, rng)["clip"][0]}  # [F, C, H, W]
            for n, mask in enumerate(masks):
                context, targets, distance = mask(sample, rng(MASKS + n))
                out |= {f"context_{n}": context, f"targets_{n}": targets}
                out |= {f"distance_{n}": distance} if cfg.context_loss else {}
            return out

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clips, masks = batch["clip"], range(len(self.cfg.mask_blocks))
        contexts, targets = ([batch[f"{name}_{n}"] for n in masks] for name in ("context", "targets"))
        with torch.no_grad():
            encoded = wide(self.target(clips).tokens)  # [B, N, D]
            wanted = F.layer_norm(encoded, encoded.shape[-1:])
        features = self.backbone([clips for _ in masks], keep=contexts)
        outputs = self.predicted(features, contexts, targets)  # for each mask [B, K + M, E]
        losses = []
        for n, (output, context, target) in enumerate(zip(outputs, contexts, targets, strict=True)):
            seen = context.shape[1]
            loss = (wide(self.predict(output[:, seen:])) - pick(wanted, target)).abs().mean()
            if self.predict_context is not None:
                away = (wide(self.predict_context(output[:, :seen])) - pick(wanted, context)).abs().mean(-1)  # [B, K]
                loss = loss + self.cfg.context_weight(step) * (away / batch[f"distance_{n}"].sqrt()).mean()
            losses.append(loss)
        return torch.stack(losses).mean(), health(encoded.mean(1))

    def predicted(self, features: list[Features], contexts: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
        """The outputs of the predictor for each mask [B, K + M, E], all masks in one pass: first those at the tokens of
        the context, of which `features` are the encoder's, then those at the targets."""
        grid, device = features[0].grid, contexts[0].device
        head = self.cfg.predictor_dim // self.cfg.predictor_heads
        rotation = self._rotations.of((grid, device), lambda: clip_rotation(head, grid, device))
        tokens, shapes, cosines, sines = [], [], [], []
        for n, (seen, context, target) in enumerate(zip(features, contexts, targets, strict=True)):
            known = self.embed(seen.tokens)  # [B, K, E]
            unknown = self.mask_tokens[n].to(known.dtype).expand(*target.shape, -1)  # [B, M, E]
            tokens.append(torch.cat([known, unknown], dim=1).flatten(0, 1))
            index = torch.cat([context, target], dim=1)
            shapes.append((index.shape[0], index.shape[1]))
            cos, sin = rotation_at(rotation, index)
            cosines.append(cos)
            sines.append(sin)
        x, rotations = torch.cat(tokens), (torch.cat(cosines), torch.cat(sines))
        for block in self.blocks:
            x = block(x, shapes, rotations)
        pieces = self.norm(x).split([b * n for b, n in shapes])
        return [piece.view(*shape, -1) for piece, shape in zip(pieces, shapes, strict=True)]

    def after_step(self, step: int) -> None:
        ema_update(self.target, self.backbone, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.target, "mean")}
