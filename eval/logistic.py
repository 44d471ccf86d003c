"""Logistic regression on frozen features, as DINOv2 and DINOv3 report it (arXiv 2304.07193, 2508.10104).

    min over W, b of   ½ ‖W‖² + C · Σ cross-entropy(x W + b, y)

It is solved by L-BFGS with a strong Wolfe line search, in fp64, on all features at once, which are read in chunks. C is
chosen on a held-out part of the gallery, never on the query set; the regression is then solved on the whole gallery.
With `save`, the solution and the encoder are written as an image classifier, which the protocol `classifier` scores,
and from which fine-tuning can start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from common.errors import UserError
from data_pipeline.build.sources.source import class_order
from eval.feature_rows import FeatureRows, Rows, Subset, chunks
from eval.features import Encoder
from eval.knn import accuracies
from eval.score_checks import is_at_edge
from eval.text_features import TextEncoder
from pretrain.interchange import export, model_card, weights
from pretrain.interchange.layouts.class_head import Classifier

NEEDS = "labels"
VERSION = 1
CHUNK = 4096  # rows on the device at once
HISTORY = 10  # steps from which L-BFGS estimates the curvature
TYPICAL_ITERATIONS = 100  # for a value of C, in plans
REMARKS = {
    "not_converged": "logistic ended before its gradient was below its tolerance; raise logistic.iterations",
    "at_edge": "the best logistic.costs value is at the end of the grid; add values beyond it",
}


@dataclass
class Config(Section):
    # values of C, from which one is chosen; DINOv2 tries 45 from 1e-6 to 1e5
    costs: list[float] = option(lambda: [10.0**n for n in range(-6, 6)], above=0)
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery on which C is chosen
    iterations: int = option(1000, low=1)  # at most, for each C
    tolerance: float = option(1e-6, above=0)  # largest component of the gradient of the mean loss at which it ends
    seed: int = 0  # of the choice of the held-out part
    save: str = ""  # a new folder for an export of the encoder with this classifier; empty: it is not kept


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "cost": the C with the best accuracy on the held-out part, and the names of
    REMARKS: 1 if the remark applies}."""
    if not cfg.costs:
        raise UserError("logistic.costs = []: write one value of C or more")
    if cfg.save and (not isinstance(encoder, Encoder) or encoder.unit != "images" or encoder.folder is None):
        raise UserError(
            f"logistic.save = {cfg.save}: {encoder.name} is no export of an image model; write logistic.save="
        )
    side = encoder.image_size if cfg.save and isinstance(encoder, Encoder) else 0
    if side and side != encoder.backbone.image_size and not hasattr(encoder.backbone.cfg, "image_size"):
        raise UserError(
            f"logistic.save = {cfg.save}: {encoder.name} cannot store that its images have {side} pixels; write"
            f" image_size={encoder.backbone.image_size}"
        )
    if cfg.save and Path(cfg.save).exists():
        raise UserError(f"logistic.save = {cfg.save}: exists already; name a new folder, or delete it")
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    features, classes, count = gallery_set.features, gallery_set.classes, len(gallery_set.names)
    cost, at_edge = choose_cost(features, classes, count, cfg, encoder.device)
    weight, bias, gradient = fit(features, classes, count, cost, cfg, encoder.device)
    if cfg.save and isinstance(encoder, Encoder):
        save(encoder, gallery, gallery_set.names, weight, bias, Path(cfg.save))
    predicted = predict(query_set.features, weight, bias)
    scores = accuracies(predicted, query_set.classes, query_set.names, gallery_set.names)
    return scores | {"cost": cost, "not_converged": gradient > cfg.tolerance, "at_edge": at_edge}


def save(encoder: Encoder, gallery: list[str], names: list[str], weight: Tensor, bias: Tensor, folder: Path) -> None:
    """Write the encoder's export with this classifier, for images of the size whose features it has learned. Its classes
    are in the order of their labels."""
    known = [name for manifest in encoder.check(gallery).manifests for name in manifest.manifest.classes]
    order = label_order(names, known)
    classifier = Classifier(weight.T[order].float().cpu(), bias[order].float().cpu(), [names[n] for n in order])
    assert encoder.folder is not None
    backbone, facts = weights.load_backbone(encoder.folder)
    if encoder.image_size != backbone.image_size:
        backbone, _ = weights.load_backbone(encoder.folder, image_size=encoder.image_size)
    about = {"step": facts["step"], "objective": facts["objective"], "pool": encoder.pool}
    export.write(folder, backbone, about, encoder.mean, encoder.std, classifier=classifier)
    model_card.write(folder)


def label_order(names: list[str], known: list[str]) -> list[int]:
    """The indices of the classes in the order of their labels: that of the names in the manifests, `known`; without
    names, the labels are numbers, and are compared by their values."""
    values = class_order({*names})
    return sorted(range(len(names)), key=lambda n: (known if names[n] in known else [*known, *values]).index(names[n]))


def cost(cfg: Config, gallery: int, query: int, dim: int, classes: int, layers: int = 0) -> tuple[float, float]:
    """(bytes on the device, floating-point operations), see `score_plan`."""
    weights = (2 * HISTORY + 6) * (dim + 1) * classes
    evaluations = min(cfg.iterations, TYPICAL_ITERATIONS) * (len(cfg.costs) + 1)
    return 8.0 * (weights + CHUNK * (dim + 4 * classes)), 4.0 * evaluations * gallery * dim * classes


def choose_cost(
    x: FeatureRows | Tensor, y: Tensor, count: int, cfg: Config, device: torch.device | str = "cpu"
) -> tuple[float, bool]:
    """(the C whose solution on one part of the features has the best accuracy on the other, held-out part; whether it
    is at the edge of the grid)."""
    if len(cfg.costs) == 1:
        return cfg.costs[0], False
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(cfg.seed))
    held_out = max(1, int(cfg.hold_out * len(x)))  # number of features
    chosen, rest = order[:held_out].sort().values, order[held_out:].sort().values  # read in the order of the file
    start: Solution | None = None
    correct: dict[float, int] = {}
    for cost in sorted(cfg.costs):  # each solution is the start of the next one
        start = fit(Subset(x, rest), y[rest], count, cost, cfg, device, start)
        correct[cost] = int((predict(Subset(x, chosen), start.weight, start.bias) == y[chosen]).sum())
    return max(correct, key=correct.__getitem__), is_at_edge(list(correct.values()))


class Solution(NamedTuple):
    weight: Tensor  # [D, C], fp64 on the device
    bias: Tensor  # [C]
    gradient: float  # largest component of the gradient of the mean loss


def fit(
    x: Rows,
    y: Tensor,
    count: int,
    cost: float,
    cfg: Config,
    device: torch.device | str = "cpu",
    start: Solution | None = None,
) -> Solution:
    """The regression on features [N, D] with class numbers [N] below C = `count`. `start`: one near the solution."""
    zeros = torch.zeros(x.shape[1] + 1, count, dtype=torch.float64, device=device)
    weights = zeros if start is None else torch.cat([start.weight, start.bias[None]])  # [D + 1, C], the bias last
    weights = weights.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=cfg.iterations,
        max_eval=2 * cfg.iterations,
        tolerance_grad=cfg.tolerance,
        tolerance_change=0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        """The objective divided by C · N, and its gradient."""
        weight, bias = weights[:-1], weights[-1]
        loss = weight.square().sum() / (2 * cost * len(x))
        gradient = torch.cat([weight / (cost * len(x)), zeros[:1]])
        for first, part in chunks(x, CHUNK, device):
            inputs, target = part.double(), y[first : first + CHUNK].to(device)  # [n, D], [n]
            log_p = (inputs @ weight + bias).log_softmax(-1)  # [n, C]
            loss += F.nll_loss(log_p, target, reduction="sum") / len(x)
            error = (log_p.exp() - F.one_hot(target, count)) / len(x)
            gradient[:-1] += inputs.T @ error
            gradient[-1] += error.sum(0)
        weights.grad = gradient
        return loss

    solver.step(closure)
    closure()  # the solver's last evaluation need not be that of the weights which it returns
    return Solution(weights.detach()[:-1], weights.detach()[-1], float(weights.grad.abs().max()))


def predict(x: Rows, weight: Tensor, bias: Tensor) -> Tensor:
    """Class numbers [N], on the CPU, of features [N, D]."""
    logits = (part.double() @ weight + bias for _, part in chunks(x, CHUNK, weight.device))
    return torch.cat([each.argmax(1).cpu() for each in logits])
