"""Linear probe: one linear layer on frozen features, trained for a grid of learning rates and inputs at once.

As in DINOv2 and DINOv3 (arXiv 2304.07193, 2508.10104): SGD with momentum 0.9, a cosine schedule to zero, and learning
rates that are given for a batch of 256. A head reads the class tokens of the last 1 or 4 blocks, or the mean of the last
block's patches, or both; all of them are stored by one extraction. Features are standardised with the statistics of the
gallery, which equals MAE's batch norm without affine parameters (arXiv 2111.06377). The head is chosen on a held-out
tenth of the gallery, as in CAPI (arXiv 2502.08769); DINOv2 chooses it on the set that is reported.

Shapes: N images, D columns of a stored row, d of them are read by an input, R learning rates, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from common.errors import UserError
from eval.feature_rows import FeatureRows, Rows, Standardized, Subset, chunks, statistics
from eval.features import Encoder
from eval.knn import accuracies
from eval.score_checks import is_at_edge
from eval.text_features import TextEncoder

NEEDS = "labels"
VERSION = 4
CHUNK = 1024  # rows whose logits are computed at once
REMARKS = {
    "at_edge": "the best linear.rates value is at the end of the grid; add values beyond it",
    "chosen_on_query": "linear.select_on is query, so the head was chosen on the samples that are scored",
}


@dataclass
class Config(Section):
    steps: int = option(2000, low=1)  # number of steps; DINOv2: 12500
    batch: int = option(256, low=1)  # samples in a step; DINOv2: 1024
    # learning rates for a batch of 256
    rates: list[float] = option(lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0], above=0)
    # numbers of last blocks whose class tokens are read; only a ViT has those of several blocks
    layers: list[int] = option(lambda: [1, 4], low=1)
    # what is read: class tokens, the mean of the patches of the last block, or both
    pooling: list[Literal["cls", "mean", "cls+mean"]] = option(lambda: ["cls", "mean", "cls+mean"])
    standardize: bool = True  # false: features as they are, as in DINOv2
    # samples on which the head is chosen: a part of the gallery, or the query samples, as in DINOv2
    select_on: Literal["hold_out", "query"] = "hold_out"
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery that is held out
    seed: int = 0  # of the initial weights and the batches


class Inputs(NamedTuple):
    """What a head reads of a stored row."""

    layers: int  # number of last blocks whose class tokens are read; 0: none
    mean: bool  # whether the mean of the patches is read
    columns: Tensor  # long [d]


def layers(cfg: Config) -> int:
    """The number of blocks whose class tokens an extraction has to store."""
    return max(cfg.layers, default=0)


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy"}, of the head that has the best accuracy on the held-out part: {"rate": its
    learning rate, "layers": number of blocks whose class tokens it reads, "patch_mean": 1 if it reads the mean of the
    patches}, and the names of REMARKS: 1 if the remark applies."""
    for key in ("rates", "layers", "pooling"):
        if not getattr(cfg, key):
            raise UserError(f"linear.{key} = []: write one value or more")
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    own_labels = {name: n for n, name in enumerate(gallery_set.names)}
    truth = torch.tensor([own_labels.get(name, -1) for name in query_set.names])[query_set.classes]  # [Q]
    stored = query_set.stored()
    probe = fit(
        gallery_set.stored(),
        gallery_set.classes,
        len(gallery_set.names),
        cfg,
        encoder.device,
        inputs_of(encoder, cfg),
        (stored, truth) if cfg.select_on == "query" else None,
    )
    scores = accuracies(probe.predict(stored), query_set.classes, query_set.names, gallery_set.names)
    chosen = {"rate": probe.rate, "layers": probe.inputs.layers, "patch_mean": float(probe.inputs.mean)}
    return scores | chosen | {"at_edge": probe.at_edge, "chosen_on_query": cfg.select_on == "query"}


def inputs_of(encoder: Encoder | TextEncoder, cfg: Config) -> list[Inputs]:
    """The inputs of the grid that the features of an encoder have, without repetitions. If only one vector is stored for
    each sample, it is the only one."""
    if not isinstance(encoder, Encoder) or not encoder.layers:
        return []
    found = {}
    for pooling in cfg.pooling:
        for count in cfg.layers:
            n, mean = (0 if pooling == "mean" else min(count, encoder.layers)), pooling != "cls"
            found[n, mean] = Inputs(n, mean, encoder.columns(n, mean))
    return list(found.values())


def cost(cfg: Config, gallery: int, query: int, dim: int, classes: int, layers: int = 0) -> tuple[float, float]:
    """(bytes on the device, floating-point operations), see `score_plan`. `layers`: of `Encoder`."""
    pooled = [
        (0 if pooling == "mean" else min(n, layers), pooling != "cls") for pooling in cfg.pooling for n in cfg.layers
    ]
    widths = [dim * (n + mean) for n, mean in {*pooled}] if layers else [dim]
    outputs = len(cfg.rates) * classes
    heads = 2 * sum(widths)  # weights and momenta
    samples = cfg.batch * (dim * (layers + 1) + 3 * outputs) + CHUNK * (dim * (layers + 1) + outputs)
    return 4.0 * (heads * outputs + samples), 4.0 * cfg.steps * cfg.batch * sum(widths) * outputs


class Probe(NamedTuple):
    """The chosen head."""

    weight: Tensor  # [d, C], on the device
    bias: Tensor  # [C]
    mean: Tensor  # [D], and std, by which features are standardised
    std: Tensor
    inputs: Inputs
    rate: float
    at_edge: bool  # whether the best learning rate is at the edge of the grid

    def predict(self, rows: Rows, allowed: Tensor | None = None) -> Tensor:
        """Class numbers [N], on the CPU, of features [N, D]. `allowed`: the classes that can be answered; None: all."""
        standard = Standardized(rows, self.mean, self.std)
        columns = self.inputs.columns.to(self.weight.device)
        classes = slice(None) if allowed is None else allowed.to(self.weight.device)
        weight, bias = self.weight[:, classes], self.bias[classes]
        logits = (x[:, columns] @ weight + bias for _, x in chunks(standard, CHUNK, self.weight.device))
        predicted = torch.cat([each.argmax(1).cpu() for each in logits])
        return predicted if allowed is None else allowed[predicted]


def fit(
    gallery: Rows,
    classes: Tensor,
    count: int,
    cfg: Config,
    device: torch.device | str = "cpu",
    inputs: list[Inputs] | None = None,
    select_on: tuple[Rows, Tensor] | None = None,
) -> Probe:
    """The best head of the grid for gallery features [N, D] with class numbers [N] below `count`.

    `inputs`: those of the grid; default: the whole row. `select_on`: features and class numbers on which the head is
    chosen; default: a held-out part of the gallery.
    """
    generator = torch.Generator().manual_seed(cfg.seed)
    inputs = inputs or [Inputs(1, False, torch.arange(gallery.shape[1]))]
    mean, std = statistics(gallery, device)
    if not cfg.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    rows = Standardized(gallery, mean, std)
    order = torch.randperm(len(gallery), generator=generator)
    held_out = 0 if select_on else max(1, int(cfg.hold_out * len(gallery)))  # number of features
    trained, chosen_on = order[held_out:], order[:held_out].sort().values
    heads = train(Subset(rows, trained), classes[trained], count, cfg, generator, device, inputs)
    if select_on is None:
        select_on = (Subset(gallery, chosen_on), classes[chosen_on])
    correct = torch.zeros(len(inputs), len(cfg.rates), dtype=torch.long)
    for first, x in chunks(Standardized(select_on[0], mean, std), CHUNK, device):
        truth = select_on[1][first : first + CHUNK].to(device)
        for n, ((weight, bias), each) in enumerate(zip(heads, inputs, strict=True)):
            logits = (x[:, each.columns.to(device)] @ weight + bias).unflatten(1, (len(cfg.rates), count))  # [c, R, C]
            correct[n] += (logits.argmax(-1) == truth.unsqueeze(1)).sum(0).cpu()
    n, best = divmod(int(correct.argmax()), len(cfg.rates))
    weight, bias = (values[..., best * count : (best + 1) * count].clone() for values in heads[n])
    by_rate = [int(c) for _, c in sorted(zip(cfg.rates, correct[n].tolist(), strict=True))]
    return Probe(weight, bias, mean, std, inputs[n], cfg.rates[best], is_at_edge(by_rate))


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
    probe = fit(gallery, classes, count, cfg, device)
    return probe.predict(query), probe.rate, probe.at_edge


def train(
    x: Rows,
    y: Tensor,
    count: int,
    cfg: Config,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    inputs: list[Inputs] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Train R independent heads, one for each learning rate, for each of the inputs (default: the whole row), all on the
    same batches. Returns (weight [d, R·C], bias [R·C]) for each input.

    `x`: features [N, D]; `y`: class numbers [N], below C = `count`.
    """
    inputs = inputs or [Inputs(1, False, torch.arange(x.shape[1]))]
    columns = [each.columns.to(device) for each in inputs]
    rates = (torch.tensor(cfg.rates).repeat_interleave(count) * cfg.batch / 256).to(device)  # [R·C]
    initial = torch.randn(x.shape[1], count, generator=generator).mul(0.01).to(device)  # [D, C]
    weights = [initial[each].repeat(1, len(cfg.rates)) for each in columns]
    biases = [torch.zeros(len(rates), device=device) for _ in columns]
    momenta = [[torch.zeros_like(value) for value in values] for values in zip(weights, biases, strict=True)]
    for step in range(cfg.steps):
        chosen = torch.randint(len(x), (cfg.batch,), generator=generator)  # [B]
        row = x[chosen].to(device)  # [B, D]
        target = F.one_hot(y[chosen].to(device), count).float().unsqueeze(1)  # [B, 1, C]
        lr = rates * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
        for weight, bias, of_head, each in zip(weights, biases, momenta, columns, strict=True):
            inputs_ = row[:, each]  # [B, d]
            logits = (inputs_ @ weight + bias).unflatten(1, (len(cfg.rates), count))  # [B, R, C]
            # the gradient of the cross-entropy, [B, R·C]
            error = ((logits.softmax(-1) - target) / cfg.batch).flatten(1)
            # A learning rate that is too high saturates the softmax. Without this, denormal numbers make the products
            # 7 times slower.
            error = F.hardshrink(error, 1e-20)
            of_head[0].addmm_(inputs_.T, error, beta=0.9)  # in place, as the heads may take gigabytes
            of_head[1].mul_(0.9).add_(error.sum(0))
            for value, momentum in zip((weight, bias), of_head, strict=True):
                value.addcmul_(momentum, lr, value=-1)
    return list(zip(weights, biases, strict=True))
