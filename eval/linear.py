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
from eval.feature_cache import FeatureRows, Rows, Standardized, Subset, chunks, statistics
from eval.features import Encoder
from eval.knn import accuracies
from eval.score_checks import is_at_edge
from eval.text_features import TextEncoder

NEEDS = "labels"
VERSION = 2
CHUNK = 1024  # rows whose logits are computed at once
REMARKS = {"at_edge": "the best linear.rates value is at the end of the grid; add values beyond it"}


@dataclass
class Config(Section):
    steps: int = option(2000, low=1)  # number of steps
    batch: int = option(256, low=1)  # samples in a step
    # learning rates for a batch of 256; the best one is chosen
    rates: list[float] = option(lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], above=0)
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery on which the learning rate is chosen
    seed: int = 0  # of the initial weights and the batches


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "rate": the learning rate with the best accuracy on the held-out part,
    "at_edge": 1 if this remark of REMARKS applies}."""
    if not cfg.rates:
        raise UserError("linear.rates = []: write one learning rate or more")
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    predicted, rate, at_edge = classify(
        gallery_set.features, gallery_set.classes, query_set.features, len(gallery_set.names), cfg, encoder.device
    )
    return accuracies(predicted, query_set.classes, query_set.names, gallery_set.names) | {
        "rate": rate,
        "at_edge": at_edge,
    }


def classify(
    gallery: FeatureRows | Tensor,
    classes: Tensor,
    query: FeatureRows | Tensor,
    count: int,
    cfg: Config,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float, bool]:
    """(class numbers [Q] on the CPU, the chosen learning rate, whether it is at the edge of the grid) for query features
    [Q, D], from gallery features [N, D] with class numbers [N] below `count`."""
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(gallery), generator=generator)
    held_out = max(1, int(cfg.hold_out * len(gallery)))  # number of features
    mean, std = statistics(gallery, device)
    rows = Standardized(gallery, mean, std)
    trained, chosen_on = order[held_out:], order[:held_out].sort().values
    weight, bias = train(Subset(rows, trained), classes[trained], count, cfg, generator, device)
    correct = torch.zeros(len(cfg.rates), dtype=torch.long)
    for first, x in chunks(Subset(rows, chosen_on), CHUNK, device):
        logits = (x @ weight + bias).unflatten(1, (len(cfg.rates), count))  # [chunk, R, C]
        truth = classes[chosen_on[first : first + CHUNK]].to(device)
        correct += (logits.argmax(-1) == truth.unsqueeze(1)).sum(0).cpu()
    best = int(correct.argmax())
    head = slice(best * count, (best + 1) * count)
    logits_of = (x @ weight[:, head] + bias[head] for _, x in chunks(Standardized(query, mean, std), CHUNK, device))
    by_rate = [int(n) for _, n in sorted(zip(cfg.rates, correct.tolist(), strict=True))]
    return torch.cat([logits.argmax(1).cpu() for logits in logits_of]), cfg.rates[best], is_at_edge(by_rate)


def train(
    x: Rows,
    y: Tensor,
    count: int,
    cfg: Config,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Train R independent heads, one for each learning rate, on the same batches. Returns weight [D, R·C] and bias
    [R·C].

    `x`: features [N, D]; `y`: class numbers [N], below C = `count`.
    """
    rates = (torch.tensor(cfg.rates).repeat_interleave(count) * cfg.batch / 256).to(device)  # [R·C]
    weight = torch.randn(x.shape[1], count, generator=generator).mul(0.01).to(device).repeat(1, len(cfg.rates))
    bias = torch.zeros(len(rates), device=device)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(cfg.steps):
        chosen = torch.randint(len(x), (cfg.batch,), generator=generator)  # [B]
        inputs = x[chosen].to(device)  # [B, D]
        target = F.one_hot(y[chosen].to(device), count).float().unsqueeze(1)  # [B, 1, C]
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
