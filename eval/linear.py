"""Linear probe: one linear layer on frozen, standardised features, trained for a grid of learning rates at once.

As in DINOv2 (arXiv 2304.07193): SGD with momentum 0.9, a cosine schedule to zero, and learning rates that are given for
a batch of 256. Features are standardised with the statistics of the gallery, which equals MAE's batch norm without
affine parameters. The learning rate is chosen on a held-out tenth of the gallery, never on the query set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from common.errors import UserError
from eval.features import Encoder
from eval.knn import accuracies
from eval.texts import TextEncoder

VERSION = 1


@dataclass
class Config(Section):
    steps: int = option(2000, low=1)  # number of steps
    batch: int = option(256, low=1)  # samples in a step
    # learning rates for a batch of 256; the best one is chosen
    rates: list[float] = option(lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], above=0)
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery on which the learning rate is chosen
    seed: int = 0  # of the initial weights and the batches


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "rate": the learning rate with the best accuracy on the held-out part}."""
    if not cfg.rates:
        raise UserError("linear.rates = []: write one learning rate or more")
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    names = sorted(set(gallery_set.labels))
    classes = torch.tensor([names.index(label) for label in gallery_set.labels])  # [N]
    predicted, rate = classify(gallery_set.features, classes, query_set.features, len(names), cfg)
    return accuracies(predicted, query_set.labels, names) | {"rate": rate}


def classify(gallery: Tensor, classes: Tensor, query: Tensor, count: int, cfg: Config) -> tuple[Tensor, float]:
    """(class numbers [Q], the chosen learning rate) for query features [Q, D], from gallery features [N, D] with class
    numbers [N] below `count`."""
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(gallery), generator=generator)
    held_out = max(1, int(cfg.hold_out * len(gallery)))  # number of features
    mean, std = gallery.mean(0), gallery.std(0) + 1e-6
    gallery, query = (gallery - mean) / std, (query - mean) / std
    weight, bias = train(gallery[order[held_out:]], classes[order[held_out:]], count, cfg, generator)
    logits = (gallery[order[:held_out]] @ weight + bias).unflatten(1, (len(cfg.rates), count))  # [h, R, C]
    scores = (logits.argmax(-1) == classes[order[:held_out]].unsqueeze(1)).float().mean(0)  # [R]
    best = int(scores.argmax())
    chosen = slice(best * count, (best + 1) * count)
    return (query @ weight[:, chosen] + bias[chosen]).argmax(1), cfg.rates[best]


def train(x: Tensor, y: Tensor, count: int, cfg: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Train R independent heads, one for each learning rate, on the same batches. Returns weight [D, R·C] and bias
    [R·C].

    `x`: features [N, D]; `y`: class numbers [N], below C = `count`.
    """
    rates = torch.tensor(cfg.rates).repeat_interleave(count) * cfg.batch / 256  # [R·C]
    weight = torch.randn(x.shape[1], count, generator=generator).mul(0.01).repeat(1, len(cfg.rates))
    bias = torch.zeros(len(rates))
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(cfg.steps):
        chosen = torch.randint(len(x), (cfg.batch,), generator=generator)  # [B]
        inputs, target = x[chosen], F.one_hot(y[chosen], count).float().unsqueeze(1)  # [B, D], [B, 1, C]
        logits = (inputs @ weight + bias).unflatten(1, (len(cfg.rates), count))  # [B, R, C]
        error = ((logits.softmax(-1) - target) / cfg.batch).flatten(1)  # the gradient of the cross-entropy, [B, R·C]
        # A learning rate that is too high saturates the softmax. Without this, denormal numbers make the products 7
        # times slower.
        error = F.hardshrink(error, 1e-20)
        lr = rates * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
        for value, momentum, gradient in zip((weight, bias), momenta, (inputs.T @ error, error.sum(0)), strict=True):
            momentum.mul_(0.9).add_(gradient)
            value.sub_(lr * momentum)
    return weight, bias
