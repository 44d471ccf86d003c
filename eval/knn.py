"""k-nearest-neighbour classification on frozen features, as DINO and DINOv2 report it (arXiv 2104.14294, 2304.07193).

The cosine similarity of a query with every gallery image is computed. The k nearest images vote for their classes, with
weight exp(similarity / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from eval.features import Encoder
from eval.texts import TextEncoder

VERSION = 1  # is increased by every change that can affect scores


@dataclass
class Config(Section):
    k: int = option(10, low=1)  # number of neighbours that vote; in a smaller gallery all images vote
    temperature: float = option(0.07, above=0)  # of the weights of votes


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy": share of query images whose class wins the vote, "balanced_accuracy": its mean over classes}."""
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    names = sorted(set(gallery_set.labels))
    classes = torch.tensor([names.index(label) for label in gallery_set.labels])  # [N]
    predicted = classify(gallery_set.features, classes, query_set.features, cfg.k, cfg.temperature)
    return accuracies(predicted, query_set.labels, names)


def classify(gallery: Tensor, classes: Tensor, query: Tensor, k: int, temperature: float, chunk: int = 1024) -> Tensor:
    """Class numbers [Q] for query features [Q, D], from gallery features [N, D] with class numbers [N].

    `chunk` queries are classified at a time, which takes memory for `chunk` · N similarities.
    """
    gallery, k = F.normalize(gallery, dim=1), min(k, len(gallery))
    predicted = []
    for part in F.normalize(query, dim=1).split(chunk):
        similarity, nearest = (part @ gallery.T).topk(k)  # [chunk, k]
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), int(classes.max()) + 1).scatter_add_(1, classes[nearest], weight)  # [chunk, C]
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def accuracies(predicted: Tensor, labels: list[str], names: list[str]) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy"} of predicted class numbers [Q] for queries with the given labels.

    `names`: the classes of the gallery, by number. A query whose label is not among them counts as wrong.
    """
    correct = torch.tensor([names[int(p)] == label for p, label in zip(predicted, labels, strict=True)]).double()  # [Q]
    per_class = [correct[[i for i, label in enumerate(labels) if label == name]].mean() for name in sorted(set(labels))]
    return {"accuracy": correct.mean().item(), "balanced_accuracy": torch.stack(per_class).mean().item()}
