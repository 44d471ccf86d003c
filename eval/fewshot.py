"""Few-shot classification: ridge regression on a few labelled samples of each class, for several random choices.

As in big_vision (`evaluators/fewshot_lsr.py`): features are standardised with the statistics of the chosen samples
(their biased standard deviation + 1e-5), a constant feature stands for the bias, and the targets are 1 for the class of a sample and −1 for the others:

    W = argmin ‖X W − Y‖² + λ ‖W‖²

It is solved in closed form, with the smaller one of X Xᵀ and Xᵀ X. This takes seconds on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from common.errors import UserError
from eval.feature_rows import FeatureRows, Standardized, chunks, statistics
from eval.features import Encoder
from eval.knn import accuracies
from eval.text_features import TextEncoder

NEEDS = "labels"
VERSION = 2
CHUNK = 4096  # queries on the device at once
CONSTANT = 100.0  # the feature that stands for the bias; large, so that the penalty hardly affects the bias


@dataclass
class Config(Section):
    shots: list[int] = option(lambda: [1, 5, 10, 25], low=1)  # labelled samples of each class
    seeds: int = option(3, low=1)  # number of random choices of these samples
    penalty: float = option(1024.0, above=0)  # λ


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy_N", "std_N": mean and standard deviation over the seeds with N shots; "accuracy": the mean with the
    most shots; "shots": their number}. A class with fewer samples gives all of them; numbers of shots that no class has are left out.
    """
    if not cfg.shots:
        raise UserError("fewshot.shots = []: write one number of samples or more")
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    largest = int(torch.bincount(gallery_set.classes).max())
    shots = [n for n in sorted(set(cfg.shots)) if n <= largest]
    if not shots:
        raise UserError(f"fewshot.shots = {cfg.shots}: the largest class of the gallery has {largest} samples")
    scores: dict[str, float] = {}
    for n in shots:
        found = []
        for seed in range(cfg.seeds):
            chosen = choose(gallery_set.classes, n, seed)
            predicted = classify(
                gallery_set.features[chosen].to(encoder.device),
                gallery_set.classes[chosen].to(encoder.device),
                query_set.features,
                len(gallery_set.names),
                cfg.penalty,
            )
            found.append(accuracies(predicted, query_set.classes, query_set.names, gallery_set.names)["accuracy"])
        values = torch.tensor(found, dtype=torch.float64)
        scores |= {f"accuracy_{n}": values.mean().item(), f"std_{n}": values.std(correction=0).item()}
    return scores | {"accuracy": scores[f"accuracy_{shots[-1]}"], "shots": shots[-1]}


def cost(cfg: Config, gallery: int, query: int, dim: int, classes: int, layers: int = 0) -> tuple[float, float]:
    """(bytes on the device, floating-point operations), see `score_plan`."""
    rows = min(gallery, max(cfg.shots, default=1) * classes)
    small, operations = min(rows, dim), 2.0 * cfg.seeds * len(cfg.shots) * dim
    size = 28.0 * rows * dim + 16.0 * small**2 + 12.0 * CHUNK * (dim + classes)
    return size, operations * (rows * small + query * classes)


def choose(classes: Tensor, shots: int, seed: int) -> Tensor:
    """The numbers of `shots` random samples of each class, or of all its samples if it has fewer, from class numbers
    [N], in ascending order."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    by_class = order[classes[order].argsort(stable=True)]  # grouped by class, in random order inside
    counts = torch.bincount(classes)
    rank = torch.arange(len(classes)) - (counts.cumsum(0) - counts)[classes[by_class]]  # inside the class
    return by_class[rank < shots].sort().values


def classify(x: Tensor, y: Tensor, query: FeatureRows | Tensor, count: int, penalty: float) -> Tensor:
    """Class numbers [Q], on the CPU, for query features [Q, D], from features [n, D] with class numbers [n] below
    `count`."""
    mean, std = statistics(x, x.device, correction=0, epsilon=1e-5)
    weight = solve(with_constant(Standardized(x, mean, std)[:]), 2.0 * F.one_hot(y, count) - 1, penalty)
    parts = chunks(Standardized(query, mean, std), CHUNK, x.device)
    return torch.cat([(with_constant(part) @ weight).argmax(1).cpu() for _, part in parts])


def with_constant(x: Tensor) -> Tensor:
    """Features [n, D] in fp64 with the constant feature, [n, D + 1]."""
    return F.pad(x.double(), (0, 1), value=CONSTANT)


def solve(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The weight [D, C] of the ridge regression of targets [n, C] on features [n, D], in fp64."""
    x, y = x.double(), y.double()
    n, dim = x.shape
    gram = x.T @ x if dim <= n else x @ x.T
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(x.T @ y, factor) if dim <= n else x.T @ torch.cholesky_solve(y, factor)
