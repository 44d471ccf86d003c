"""Videos by an attentive probe: the mean of the class probabilities of several clips and views, as VideoMAE and V-JEPA
report it for Kinetics-400 and Something-Something v2 (arXiv 2203.12602, 2404.08471, 2506.09985).

    p(video) = 1 / (S V) · Σ_s Σ_v softmax(head(x_sv))

x_sv: the patches of clip s of S, in the middle of S equal parts of the video, and of view v of V, a square at one of V
places along the longer side of the frames. The head is trained as by `attentive`, on one clip at a random time. In V-JEPA 2
the head attends to the patches of all S clips of a view at once.

Shapes: B videos, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import option
from common.errors import UserError
from data_pipeline.shards.samples import Samples
from eval import attentive
from eval.feature_cache import read_batches
from eval.features import ClipEncoder
from eval.knn import accuracies
from eval.probe_training import tokens_of

NEEDS = "labels"
VERSION = 1


@dataclass
class Config(attentive.Config):
    segments: int = option(8, low=1)  # S, the number of clips; published: 8 for Kinetics, 2 for Something-Something
    views: int = option(3, low=1)  # V, the number of squares of a clip


def run(encoder: Any, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy", "rate", "decay", "segments", "views"}, see `attentive.run`."""
    if not isinstance(encoder, ClipEncoder):
        raise UserError(f"{encoder.name}: video scores models that read clips; choose attentive")
    (head,), known, grid_point = attentive.best_head(encoder, gallery, cfg)
    query_set = encoder.labelled(query)
    predicted = predict(encoder, encoder.check(query), query_set.numbers, head, cfg)
    scores = accuracies(predicted, query_set.classes, query_set.names, known)
    return scores | grid_point | {"segments": cfg.segments, "views": cfg.views}


@torch.no_grad()
def predict(encoder: ClipEncoder, samples: Samples, numbers: np.ndarray, head: nn.Module, cfg: Config) -> Tensor:
    """The classes that the head predicts for videos, long [Q] on the CPU."""
    together, predicted = cfg.segments * cfg.views, []

    def spread(samples: Samples, number: int) -> np.ndarray:
        return encoder.spread(samples, number, cfg.segments, cfg.views)

    read = partial(attentive.read_again, spread, samples)
    for _, found in read_batches(read, numbers, max(1, encoder.batch // together)):
        tokens, _ = tokens_of(encoder, np.concatenate(found))  # [B · S · V, N, D]
        shares = head(tokens).softmax(1).unflatten(0, (-1, together)).mean(1)  # [B, C]
        predicted.append(shares.argmax(1).cpu())
    return torch.cat(predicted)
