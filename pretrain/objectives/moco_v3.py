"""MoCo v3: two views of an image find each other in the batch, against a momentum encoder (arXiv 2104.02057).

    q = p(g(f(t(x)))),  k = g'(f'(t'(x))), both of length 1; f', g' are moving averages of f, g and get no gradient
    ctr(q, k) = −2 τ log [exp(q·k⁺/τ) / Σ_k exp(q·k/τ)],  k: the keys of the global batch           (eq. 1, algorithm 1)
    loss = ctr(q_1, k_2) + ctr(q_2, k_1)
    after each step: θ' ← m θ' + (1 − m) θ

There is no queue. The patch embedding of a ViT keeps its first weights (§4.2), which makes the training stable; the
paper adds fixed positions (`model.positions: sincos`). For a ResNet the paper has two layers in the projector, no norm
after the predictor, and τ = 1.

Shapes: B images of W processes, two views each, D encoder width, P outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.two_views import two_views
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import TwoViews, momentum
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.gather import gather, world
from pretrain.ops.heads import MLPHead
from pretrain.ops.precision import unit
from pretrain.ops.self_distillation import health


@dataclass
class Config(TwoViews):
    temperature: float = option(0.2, above=0)  # τ: similarities are divided by it before the softmax
    head_hidden: int = option(4096, low=1)  # width of the hidden layers of projector and predictor
    head_outputs: int = option(256, low=1)  # P, the width of what is compared
    projector_layers: int = option(3, low=1)  # linear layers of the projector; ResNet: 2
    predictor_norm: bool = True  # a batch norm without parameters after the predictor; ResNet: false
    # whether the patch embedding of a ViT keeps its first weights: random ones, or those of `init.backbone`
    freeze_patch_embed: bool = True
    # m, the share of its weights that the momentum encoder keeps in a step
    momentum: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.99, kind="cosine", final=1.0), low=0, high=1, auto=momentum
    )

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.head_hidden": 64, "objective.head_outputs": 32}]


class MoCoV3(Objective):
    kept_in_eval = ("key",)  # no drop path
    averaged = {"query": "key"}
    couples_batch = True
    least_batch = 2  # a single image has no negatives: its loss is 0

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body, hidden, outputs = backbone(local_cls_norm=False), cfg.head_hidden, cfg.head_outputs  # no local crops
        between = [hidden] * (cfg.projector_layers - 1)
        projector = MLPHead(body.embed_dim, *between, outputs, last_norm=True)
        self.query = nn.ModuleDict({"backbone": body, "projector": projector})
        self.predictor = MLPHead(outputs, hidden, outputs, last_norm=cfg.predictor_norm)
        embed: Any = getattr(body, "patch_embed", None)  # only our ViT has one
        if cfg.freeze_patch_embed and embed is None and any("patch_embed" in name for name, _ in body.named_modules()):
            raise ValueError(
                f"objective.freeze_patch_embed = true: the patch embedding of model.name = {body.cfg.name} cannot be"
                " frozen; write objective.freeze_patch_embed=false, or choose a ViT (model=vit_small)"
            )
        self.frozen = [embed] if cfg.freeze_patch_embed and embed is not None else []
        for layer in self.frozen:
            if not body.loaded:
                bound = math.sqrt(6 / (layer.weight[0].numel() + body.embed_dim))
                nn.init.uniform_(layer.weight, -bound, bound)  # Xavier, as published
            layer.requires_grad_(False)
        self.key = make_teacher(self.query, batch_statistics=True).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for layer in self.frozen:
            layer.eval()
        return self

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return two_views(cfg, about.image_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = list(batch["image"].unbind(1))  # two of [B, 3, H, W]
        with torch.no_grad():
            keys = [self.key["projector"](f.cls) for f in self.key["backbone"](images)]  # [B, P]
        features = [f.cls for f in self.query["backbone"](images)]  # [B, D]
        queries = [self.predictor(self.query["projector"](x)) for x in features]
        pairs = [contrast(q, k, self.cfg.temperature) for q, k in zip(queries, reversed(keys), strict=True)]
        return pairs[0] + pairs[1], health(features[0].detach())

    def after_step(self, step: int) -> None:
        ema_update(self.key, self.query, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.query["backbone"])}


def contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """ctr(q, k) of this rank's queries and keys [B, P], mean over its rows, with the keys of all ranks."""
    q, k = unit(q), unit(k)
    own = len(q) * world()[0] + torch.arange(len(q), device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # bf16 would round similarities to 1/256
        return 2 * temperature * F.cross_entropy(q @ gather(k).T / temperature, own)
