"""Attentive probe: a learned query attends to all patches of a frozen encoder, and a linear layer classifies the result.

As in V-JEPA and V-JEPA 2 (arXiv 2404.08471, 2506.09985): 20 heads, one for each learning rate and weight decay of a
grid, are trained at once with AdamW on the same augmented images; the rate rises for 5 of 20 epochs and then falls along
a cosine. It suits encoders whose class token was not trained, such as MAE's. The head is chosen on a held-out tenth of
the gallery. The encoder runs in every step, so no features are stored.

    q ← q + attention(q, norm(x));  q ← q + MLP(norm(q));  logits = q W + b        x: patches, q: the learned query

Shapes: B images, N patches, D features, H attention heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Section, option, option_if
from common.errors import Damaged, DataError, UserError
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import Rng
from eval import probe_training
from eval.feature_cache import read_batches
from eval.features import Encoder
from eval.knn import accuracies
from eval.probe_training import Order, cosine, tokens_of
from eval.text_features import TextEncoder
from pretrain.models.layers import Block, LayerNorm, Mlp, apply_blocks

NEEDS = "labels"
VERSION = 1


@dataclass
class Config(Section):
    epochs: int = option(20, low=1)  # over the gallery
    warmup: int = option(5, low=0)  # epochs
    batch: int = option(256, low=1)  # images in a step
    rates: list[float] = option(lambda: [5e-4, 1e-3, 1.5e-3, 2e-3], above=0)  # learning rates of the grid
    decays: list[float] = option(lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], low=0)  # weight decays of the grid
    heads: int = option(16, low=1)  # attention heads; fewer, if they do not divide the number of features
    blocks: int = option(1, low=1)  # transformer blocks, the last of which has the query; V-JEPA 2: 4
    augment: bool = True  # train on random crops and flips; false: on center crops
    # probability that a crop is flipped; 0 where left and right matter, as in videos of directions
    flip: float = option_if(0.5, "augment", True, low=0, high=1)
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery on which the head is chosen
    seed: int = 0  # of the initial weights, the order and the crops


class AttentiveHead(nn.Module):
    """Patch features [B, N, D] → logits [B, C]."""

    def __init__(self, dim: int, classes: int, heads: int = 16, blocks: int = 1):
        super().__init__()
        self.heads = math.gcd(heads, dim)
        self.blocks = nn.ModuleList(Block(dim, self.heads) for _ in range(blocks - 1))
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_x, self.norm_q = LayerNorm(dim), LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.classify = nn.Linear(dim, classes)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Weights and the query: truncated normal with std 0.02; biases: 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query, std=0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.blocks):
            x = apply_blocks(self.blocks, x)
        q = self.query.expand(len(x), -1, -1)  # [B, 1, D]
        k, v = self.to_kv(self.norm_x(x)).chunk(2, -1)
        split = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(q), k, v))  # [B, H, n, d]
        q = q + F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return self.classify((q + self.mlp(self.norm_q(q)))[:, 0])


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "rate", "decay": learning rate and weight decay of the head with the best
    accuracy on the held-out part}."""
    if not isinstance(encoder, Encoder):
        raise UserError(f"{encoder.name}: attentive scores models that read images; choose linear")
    head, known, grid_point = best_head(encoder, gallery, cfg)
    query_set = encoder.labelled(query)
    predicted = [p[0] for _, p in predict(encoder, encoder.check(query), query_set.numbers, head, cfg.batch)]
    return accuracies(torch.cat(predicted), query_set.classes, query_set.names, known) | grid_point


def best_head(encoder: Encoder, gallery: list[str], cfg: Config) -> tuple[nn.ModuleList, list[str], dict[str, float]]:
    """(the head with the best accuracy on a held-out part of the gallery, alone in its list; the names of its classes;
    its "rate" and "decay")."""
    if not cfg.rates or not cfg.decays:
        raise UserError("attentive.rates and attentive.decays: write one value or more in each")
    gallery_set = encoder.labelled(gallery)
    samples = encoder.check(gallery)
    shuffled = np.random.default_rng([cfg.seed, 1]).permutation(len(gallery_set))
    held_out = max(1, int(cfg.hold_out * len(gallery_set)))
    chosen, trained = np.sort(shuffled[:held_out]), np.sort(shuffled[held_out:])
    class_of = dict(zip(gallery_set.numbers.tolist(), gallery_set.classes.tolist(), strict=True))
    heads = fit(encoder, samples, gallery_set.numbers[trained], class_of, len(gallery_set.names), cfg)
    correct = torch.zeros(len(heads), dtype=torch.long)
    for numbers, predicted in predict(encoder, samples, gallery_set.numbers[chosen], heads, cfg.batch):
        correct += (predicted == torch.tensor([class_of[n] for n in numbers])).sum(1)
    best = int(correct.argmax())
    rate, decay = _grid(cfg)[best]
    return nn.ModuleList([heads[best]]), gallery_set.names, {"rate": rate, "decay": decay}


def fit(
    encoder: Encoder, samples: Samples, numbers: np.ndarray, class_of: dict[int, int], count: int, cfg: Config
) -> nn.ModuleList:
    """The trained heads, one for each pair of learning rate and weight decay.

    `numbers`: of the samples to train on; `class_of`: their class numbers, below `count`.
    """
    grid = _grid(cfg)
    dim = tokens_of(encoder, encoder.stand_in()[None])[0].shape[-1]
    each = [AttentiveHead(dim, count, cfg.heads, cfg.blocks) for _ in grid]
    for head in each:  # all begin with the same weights
        head.initialise(torch.Generator().manual_seed(cfg.seed))
    heads, groups = nn.ModuleList(each).to(encoder.device), []
    for head, (_, decay) in zip(each, grid, strict=True):
        vectors = [p for p in head.parameters() if p.ndim == 1]
        groups.append({"params": [p for p in head.parameters() if p.ndim > 1], "weight_decay": decay})
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    per_epoch = -(-len(numbers) // cfg.batch)
    steps, order = cfg.epochs * per_epoch, Order(numbers, cfg.seed)

    def schedule(step: int) -> None:
        for n, group in enumerate(optimizer.param_groups):
            group["lr"] = grid[n // 2][0] * cosine(step, steps, min(cfg.warmup * per_epoch, steps // 2))

    def loss(step: int, found: list[Any]) -> Tensor:
        tokens, _ = tokens_of(encoder, np.stack([image for image, _ in found]))
        target = torch.tensor([label for _, label in found]).to(encoder.device)
        return torch.stack([F.cross_entropy(head(tokens), target) for head in heads]).sum()

    def read(number: int, rng: Rng) -> tuple[np.ndarray, int]:
        return _training_image(encoder, samples, number, rng, cfg), class_of[number]

    def batches_from(first: int) -> Iterator[tuple[int, list[Any]]]:
        return probe_training.batches(read, order, cfg.batch, first, steps)

    state = probe_training.state_path(encoder, samples, "attentive", VERSION, cfg)
    probe_training.train(heads, optimizer, steps, batches_from, schedule, loss, state)
    return heads


@torch.no_grad()
def predict(
    encoder: Encoder, samples: Samples, numbers: np.ndarray, heads: nn.ModuleList, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(numbers of samples, the classes that each head predicts for them: long [heads, B] on the CPU) of consecutive
    batches."""
    for of_batch, found in read_batches(partial(read_again, encoder.read, samples), numbers, batch):
        tokens, _ = tokens_of(encoder, np.stack(found))
        yield [int(n) for n in of_batch], torch.stack([head(tokens).argmax(1) for head in heads]).cpu()


def read_again(read: Callable[[Samples, int], np.ndarray], samples: Samples, number: int) -> np.ndarray:
    """What `read` returns for a sample that could be read before."""
    try:
        return read(samples, int(number))
    except Damaged as reason:
        raise DataError(f"{samples.names}: sample {number} cannot be read any more ({reason}); run it again") from None


def _training_image(encoder: Encoder, samples: Samples, number: int, rng: Rng, cfg: Config) -> np.ndarray:
    """A random crop, which may be flipped, or the center crop, of an image or clip: uint8 [C, S, S] or [T, C, S, S]."""
    if not cfg.augment:
        return encoder.read(samples, number)
    return encoder.augmented(samples, number, rng, cfg.flip)


def _grid(cfg: Config) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of each head."""
    return [(rate, decay) for rate in cfg.rates for decay in cfg.decays]
