"""Linear probe: one linear layer on frozen, standardised features, trained for a grid of learning rates at once.

As in DINOv2 (arXiv 2304.07193): SGD with momentum 0.9, cosine to zero, learning rates given for a batch of 256.
Features are standardised with the gallery's statistics (MAE's batch norm without affine). The rate is chosen on a tenth
of the gallery that is held out, never on the query set.
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
    # learning rates for a batch of 256, one of which is chosen
    rates: list[float] = option(lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], above=0)
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery on which the learning rate is chosen
    seed: int = 0  # of the initial weights and the batches


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "rate": the learning rate with the best accuracy on the held-out part}."""
    if not cfg.rates:
        raise UserError("linear.rates = []: write one learning rate or more")
    known, asked = encoder.labelled(gallery), encoder.labelled(query)
    names = sorted(set(known.labels))
    classes = torch.tensor([names.index(label) for label in known.labels])
    predicted, rate = classify(known.features, classes, asked.features, len(names), cfg)
    return accuracies(predicted, asked.labels, names) | {"rate": rate}


def classify(gallery: Tensor, classes: Tensor, query: Tensor, count: int, cfg: Config) -> tuple[Tensor, float]:
    """(class numbers [Q], the chosen rate) for features [N, D], class numbers [N] below `count`, and query features [Q,
    D]."""
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(gallery), generator=generator)
    held_out = max(1, int(cfg.hold_out * len(gallery)))
    mean, std = gallery.mean(0), gallery.std(0) + 1e-6
    gallery, query = (gallery - mean) / std, (query - mean) / std
    weight, bias = train(gallery[order[held_out:]], classes[order[held_out:]], count, cfg, generator)
    logits = (gallery[order[:held_out]] @ weight + bias).unflatten(1, (len(cfg.rates), count))
    scores = (logits.argmax(-1) == classes[order[:held_out]].unsqueeze(1)).float().mean(0)
    best = int(scores.argmax())
    chosen = slice(best * count, (best + 1) * count)
    return (query @ weight[:, chosen] + bias[chosen]).argmax(1), cfg.rates[best]


def train(x: Tensor, y: Tensor, count: int, cfg: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Train independent heads for R learning rates at once on the same batches. Returns weight [D, R·C] and bias
    [R·C].

    `x`: features [N, D]; `y`: class numbers [N] below `count`, C.
    """
    rates = torch.tensor(cfg.rates).repeat_interleave(count) * cfg.batch / 256  # [R·C]
    weight = torch.randn(x.shape[1], count, generator=generator).mul(0.01).repeat(1, len(cfg.rates))
    bias = torch.zeros(len(rates))
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(cfg.steps):
        pick = torch.randint(len(x), (cfg.batch,), generator=generator)
        inputs, target = x[pick], F.one_hot(y[pick], count).float().unsqueeze(1)  # [B, D], [B, 1, C]
        logits = (inputs @ weight + bias).unflatten(1, (len(cfg.rates), count))
        error = ((logits.softmax(-1) - target) / cfg.batch).flatten(1)  # the gradient of the cross-entropy, [B, R·C]
        # Rates that are too high saturate the softmax: without this, denormal numbers make the products 7 times slower.
        error = F.hardshrink(error, 1e-20)
        lr = rates * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
        for value, momentum, gradient in zip((weight, bias), momenta, (inputs.T @ error, error.sum(0)), strict=True):
            momentum.mul_(0.9).add_(gradient)
            value.sub_(lr * momentum)
    return weight, bias
