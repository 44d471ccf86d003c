"""CAPI: a predictor names the clusters of masked patches, which an online clustering of a teacher finds (arXiv 2502.08769).

    student: z = f(x[visible]),  ŷ_i = h(g(mask token at place i; z)) for places i that are drawn from the masked ones;
             g is a transformer whose queries see z by cross-attention only, h are cosines with trained lengths
    teacher: t_i = f'(x)_i / ‖f'(x)_i‖ of the whole image;  logits a_i = W t_i + b of K clusters;
             q = Sinkhorn(a / τ_t) in 3 iterations, for each place i over the images of the global batch ("positionwise")
    L_clustering = −mean over all patches Σ_k q_ik log softmax(a_i / τ_c)_k, whose gradient goes to W and b alone
    L_predict    = −mean over predicted patches Σ_k q_ik log softmax(ŷ_i / τ_s)_k
    after each step: f' ← m f' + (1 − m) f

As all clusters are used equally at every place, they cannot encode the place of a patch (positional collapse). The
visible patches are a block that may wrap around the edges (inverse block mask with roll); images are only cropped and
flipped. One optimizer trains both losses. In the published code the clustering has an own one, with half of the
learning rate, as here (`lr_scales`), and a weight decay of 0.01. Class token and registers are part of z, too.

Shapes: B images, N patches, V visible, P predicted, D encoder width, E predictor width, K clusters, d width of a head.
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
from data_pipeline.views.masks import visible_block
from pretrain.models.cross_attention import CrossBlock
from pretrain.models.layers import LayerNorm, Rotation
from pretrain.models.positions import Tables, rope_angles, rope_periods
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options, momentum
from pretrain.ops.cross_entropy import cross_entropy
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import pick
from pretrain.ops.precision import wide
from pretrain.ops.self_distillation import health
from pretrain.ops.sinkhorn import sinkhorn

ROPE_BASE = 100.0  # of the predictor's rotary positions


@dataclass
class Config(Options):
    remedies = {"teacher_entropy": "lower objective.teacher_temperature or the number of clusters"}
    remedies |= {name: "raise objective.momentum" for name in ("feature_std", "rank")}

    cluster_count: int = option(16384, low=2)  # K, the number of clusters
    mask_ratio: float = option(0.65, above=0, below=1)  # share of the patches that the student does not see
    predicted_share: float = option(0.05, above=0, high=1)  # share of these that are predicted
    predictor_dim: int | None = option(None, low=1)  # E, the width of the predictor; null: that of the encoder
    predictor_depth: int = option(12, low=1)  # number of its blocks
    predictor_heads: int = option(16, low=1)  # number of attention heads in each of these blocks
    student_temperature: float = option(0.12, above=0)  # τ_s
    teacher_temperature: float = option(0.06, above=0)  # τ_t, of the logits in Sinkhorn
    clustering_temperature: float = option(0.12, above=0)  # τ_c, of the logits that learn the assignments
    positionwise: bool = True  # whether Sinkhorn is done for each place by itself; false: for all patches together
    # m, the share of its weights that the teacher keeps in a step
    momentum: Literal["auto"] | Schedule = option(lambda: Schedule(0.999), low=0, high=1, auto=momentum)
    crop_scale: float = option(0.6, above=0, high=1)  # smallest share of the image's area in a random crop

    def assignments(self) -> int:
        return int(vars(self)["cluster_count"])

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {
            "cluster_count": 32,
            "predictor_dim": 32,
            "predictor_depth": 1,
            "predictor_heads": 2,
            "predicted_share": 0.5,
        }
        first = {f"objective.{key}": value for key, value in sizes.items()}
        return [first, {"objective.positionwise": False, "objective.predictor_dim": None}]


class Clusters(nn.Module):
    """W and b of the online clustering. In the published code the weights are normal with standard deviation 1."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(count, dim)), nn.Parameter(torch.zeros(count))

    def forward(self, tokens: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
        """(L_clustering, assignments q [B, N, K]) of tokens [B, N, D], to which no gradient flows."""
        tokens = F.normalize(wide(tokens.detach()), dim=-1, eps=1e-7)
        with torch.no_grad():
            logits = F.linear(tokens, self.weight, self.bias)  # [B, N, K]
            logits = logits if cfg.positionwise else logits.flatten(0, 1)
            q = sinkhorn(logits, cfg.teacher_temperature).view(*tokens.shape[:2], -1)
        rows, tau = tokens.flatten(0, 1), cfg.clustering_temperature
        loss = cross_entropy(rows, self.weight, q.flatten(0, 1), bias=self.bias / tau, scale=1 / tau)
        return loss / len(rows), q


class ClusterHead(nn.Module):
    """h: cosines of x [R, E] with K vectors, times trained lengths, which are 1 at first (weight norm, 1602.07868)."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.vectors, self.lengths = nn.Parameter(torch.empty(count, dim)), nn.Parameter(torch.ones(count, 1))
        nn.init.trunc_normal_(self.vectors, std=0.02)

    def forward(self, x: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The mean cross-entropy with targets [R, K]."""
        weight = self.lengths * F.normalize(self.vectors, dim=-1)
        return cross_entropy(F.normalize(x, dim=-1, eps=1e-6), weight, targets, scale=1 / temperature) / len(x)


class CAPI(Objective):
    kept_in_eval = ("teacher",)  # no drop path
    averaged = {"backbone": "teacher"}
    couples_batch = True
    least_batch = 2
    lr_scales = {"clusters": 0.5}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        self.teacher = make_teacher(self.backbone).eval()
        width = self.backbone.embed_dim
        dim = cfg.predictor_dim or width
        if dim % (4 * cfg.predictor_heads):
            raise ValueError(
                f"objective.predictor_heads = {cfg.predictor_heads}: four times this must divide {dim}, its width"
            )
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, width, cfg.predictor_heads) for _ in range(cfg.predictor_depth))
        self.norm = LayerNorm(dim, 1e-6)
        self.blocks.apply(trunc_normal)
        nn.init.normal_(self.mask_token, std=0.02)
        self.clusters, self.head = Clusters(width, cfg.cluster_count), ClusterHead(dim, cfg.cluster_count)
        self._rotations = Tables()  # by grid and device

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        side = about.image_size // about.patch_size
        masked = int(side * side * cfg.mask_ratio)
        predicted = max(1, int(masked * cfg.predicted_share))  # P
        if not 0 < masked < side * side:
            raise ValueError(f"objective.mask_ratio = {cfg.mask_ratio}: masks {masked} of {side}×{side} patches")
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0))

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            draw = rng(MASKS)
            visible = visible_block((side, side), side * side - masked, draw).reshape(-1)
            places = draw.choice(np.flatnonzero(~visible), predicted, replace=False)
            return crops(sample, {"image": augment}, rng) | {"visible": np.flatnonzero(visible), "predicted": places}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, visible, places = batch["image"], batch["visible"], batch["predicted"]  # [B, …], [B, V], [B, P]
        with torch.no_grad():
            tokens = self.teacher(images).tokens  # [B, N, D]
        clustering, q = self.clusters(tokens, self.cfg)
        targets = pick(q, places).flatten(0, 1)  # [B·P, K]
        predicted = self.predict(images, visible, places).flatten(0, 1)  # [B·P, E]
        loss = self.head(predicted, targets, self.cfg.student_temperature)
        logs = {"predict": loss.detach(), "clustering": clustering.detach()} | health(tokens.mean(1), targets)
        logs["kl"] = loss.detach() - logs["teacher_entropy"]
        return loss + clustering, logs

    def predict(self, images: Tensor, visible: Tensor, places: Tensor) -> Tensor:
        """The outputs of g at `places` [B, P], from the patches `visible` [B, V]: [B, P, E]."""
        features = self.backbone(images, keep=visible)
        context = torch.cat([features.cls.unsqueeze(1), features.registers, features.tokens], dim=1)  # [B, C, D]
        cos, sin = self.rotations(features.grid, images.device)  # [N + 1, 1, d/2]; the last row is not rotated
        prefix = visible.new_full((len(visible), context.shape[1] - visible.shape[1]), len(cos) - 1)
        keys = torch.cat([prefix, visible], dim=1)
        x = self.mask_token.to(context.dtype).expand(*places.shape, -1)
        for block in self.blocks:
            x = block(x, context, (cos[places], sin[places]), (cos[keys], sin[keys]))
        return self.norm(x)

    def rotations(self, grid: tuple[int, int], device: torch.device) -> Rotation:
        """cos and sin of the patches, and of tokens without a place, in the predictor's heads: [N + 1, 1, d/2] each."""

        def make() -> Rotation:
            width = len(self.mask_token) // self.cfg.predictor_heads
            angles = rope_angles(rope_periods(width, ROPE_BASE, device), grid)[:, : width // 2]
            angles = torch.cat([angles, angles.new_zeros(1, width // 2)]).unsqueeze(1)
            return angles.cos(), angles.sin()

        return self._rotations.of((grid, device), make)

    def after_step(self, step: int) -> None:
        ema_update(self.teacher, self.backbone, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.teacher, "mean")}
