"""BYOL: an online network predicts what its moving average makes of another view of the image (arXiv 2006.07733).

    online: q(g(f(t(x))));   target: g'(f'(t'(x))), where f', g' are moving averages of f, g and get no gradient
    loss = 2 − 2 cos(q(g(f(t(x)))), g'(f'(t'(x)))), plus the same with the two views exchanged     (eq. 2)
    after each step: ξ ← τ ξ + (1 − τ) θ,   τ = 1 − (1 − τ_base) · (cos(πk/K) + 1) / 2             (eq. 1, §3.2)

As published, each view is normalised by itself, and the target's batch norms use the target's own batch.

Shapes: B images, two views each, D encoder width, P outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.config import option
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.two_views import two_views
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import TwoViews, momentum
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.heads import MLPHead
from pretrain.ops.precision import unit
from pretrain.ops.self_distillation import health


@dataclass
class Config(TwoViews):
    head_hidden: int = option(4096, low=1)  # width of the hidden layers of projector and predictor
    head_outputs: int = option(256, low=1)  # P, the width of what is predicted
    # τ, the share of its weights that the target keeps in a step. Published: 0.996 in 1000 epochs, 0.99 in 300
    momentum: Literal["auto"] | Schedule = option(
        lambda: Schedule(0.996, kind="cosine", final=1.0), low=0, high=1, auto=momentum
    )

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.head_hidden": 64, "objective.head_outputs": 32}]


class BYOL(Objective):
    kept_in_eval = ("target",)  # no drop path
    averaged = {"online": "target"}
    couples_batch = True  # by the batch norms of the heads
    least_batch = 2

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone(local_cls_norm=False)  # there are no local crops
        projector = MLPHead(body.embed_dim, cfg.head_hidden, cfg.head_outputs)
        self.online = nn.ModuleDict({"backbone": body, "projector": projector})
        self.predictor = MLPHead(cfg.head_outputs, cfg.head_hidden, cfg.head_outputs)
        self.target = make_teacher(self.online, batch_statistics=True).eval()

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return two_views(cfg, about.image_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = list(batch["image"].unbind(1))  # two of [B, 3, H, W]
        with torch.no_grad():
            targets = [self.target["projector"](f.cls) for f in self.target["backbone"](images)]  # [B, P]
        features = [f.cls for f in self.online["backbone"](images)]  # [B, D]
        predictions = [self.predictor(self.online["projector"](x)) for x in features]
        pairs = [distance(q, z) for q, z in zip(predictions, reversed(targets), strict=True)]
        return pairs[0] + pairs[1], health(features[0].detach())

    def after_step(self, step: int) -> None:
        ema_update(self.target, self.online, self.cfg.momentum(step), self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.online["backbone"])}


def distance(q: Tensor, z: Tensor) -> Tensor:
    """‖q/‖q‖ − z/‖z‖‖² = 2 − 2 cos(q, z), mean over the rows of predictions q and targets z [B, P]; fp32 or wider."""
    return 2 - 2 * (unit(q) * unit(z)).sum(-1).mean()
