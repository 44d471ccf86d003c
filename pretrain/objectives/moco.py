"""MoCo: a view of an image finds the other one among a queue of views of earlier images (arXiv 1911.05722, 2003.04297).

    q = g(f(t(x))),  k = g'(f'(t'(x))), both of length 1; f', g' are moving averages of f, g and get no gradient
    loss = −log [exp(q·k/τ) / (exp(q·k/τ) + Σ_i exp(q·k_i/τ))],  k_i: the keys of earlier batches   (1911.05722, eq. 1)
    after each step: θ' ← m θ' + (1 − m) θ (eq. 2), and the batch's keys replace the oldest ones of the queue

The defaults are those of v2; v1 has one linear layer as its head (`head_hidden: null`), τ = 0.07, no blur, and
`jitter: [0.4, 0.4, 0.4, 0.4]`, which it applies to every view (here, as in v2, to 80 % of them). Where a query and its
key are normalised by the same few images, batch norm tells them apart from the queue. The paper normalises within each
GPU and shuffles the keys over GPUs; here every batch norm normalises over the whole global batch, queries and keys each
by themselves, so that there is no part of the batch to recognise.

Shapes: B images, two views each, D encoder width, P outputs, Q rows of the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Facts, option
from common.schedules import Schedule
from data_pipeline.parts.part import About
from data_pipeline.views.two_views import two_views
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import TwoViews, momentum
from pretrain.ops.ema import ema_update, make_teacher
from pretrain.ops.precision import unit
from pretrain.ops.queue import Queue
from pretrain.ops.self_distillation import health


def negatives(facts: Facts) -> int:
    """In whole batches, of which there are at least 2: as many as make the key encoder with `momentum: auto` change by a
    quarter, so that all keys are of nearly the same encoder; at most a twentieth of the samples, and 65,536.

    A momentum of 0.999 and batches of 256 give 64,000; the paper has 65,536.
    """
    batches = 0.25 / (1 - momentum(facts)(0))
    return max(2, round(min(batches, facts.samples / 20 / facts.batch, 65536 / facts.batch))) * facts.batch


@dataclass
class Config(TwoViews):
    temperature: float = option(0.2, above=0)  # τ: similarities are divided by it before the softmax
    # hidden width of the head of two layers; null: one linear layer
    head_hidden: int | None = option(2048, low=1)
    head_outputs: int = option(128, low=1)  # P, the width of what is compared
    # Q, the number of keys that are kept: a multiple of data.batch
    queue_size: int | Literal["auto"] = option(65536, low=1, auto=negatives)
    # m, the share of its weights that the key encoder keeps in a step
    momentum: Literal["auto"] | Schedule = option(lambda: Schedule(0.999), low=0, high=1, auto=momentum)
    crop_scale: float = option(0.2, above=0, high=1)  # smallest share of the image's area in a random crop
    # strengths of the colour jitter: brightness, contrast, saturation, hue
    jitter: list[float] = option(lambda: [0.4, 0.4, 0.4, 0.1], low=0)
    blur: list[float] = option(lambda: [0.5, 0.5], low=0, high=1)  # probability of a blur in the first and second view
    solarize: list[float] = option(lambda: [0.0, 0.0], low=0, high=1)  # the same of an inversion of bright pixels

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.head_hidden": 64, "objective.head_outputs": 32, "objective.queue_size": 32}]


class MoCo(Objective):
    kept_in_eval = ("key",)  # no drop path
    averaged = {"query": "key"}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        body = backbone(local_cls_norm=False)  # there are no local crops
        widths = [body.embed_dim, *([cfg.head_hidden] if cfg.head_hidden else []), cfg.head_outputs]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        layers += [nn.ReLU(), nn.Linear(widths[1], widths[2])] if cfg.head_hidden else []
        self.query = nn.ModuleDict({"backbone": body, "head": nn.Sequential(*layers)})
        self.key = make_teacher(self.query, batch_statistics=True).eval()
        self.queue = Queue(cfg.queue_size, cfg.head_outputs)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        return two_views(cfg, about.image_size)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch["image"].unbind(1)  # [B, 3, H, W]
        features = self.query["backbone"](first).cls  # [B, D]
        q = unit(self.query["head"](features))  # [B, P]
        with torch.no_grad():
            k = unit(self.key["head"](self.key["backbone"](second).cls))
        self.queue.hold(k, step)
        logits = similarities(q, k, self.queue.rows.to(q.dtype)) / self.cfg.temperature
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        return loss, {"accuracy": (logits.argmax(1) == 0).float().mean()} | health(features.detach())

    def after_step(self, step: int) -> None:
        ema_update(self.key, self.query, self.cfg.momentum(step), self.skipped)
        self.queue.push(step, self.skipped)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.query["backbone"])}


def similarities(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """[B, 1 + Q]: of queries q [B, P] with their own keys k [B, P], then with the rows [Q, P] of the queue."""
    with torch.autocast(q.device.type, enabled=False):  # bf16 would round similarities to 1/256
        return torch.cat([(q * k).sum(1, keepdim=True), q @ rows.T], dim=1)
