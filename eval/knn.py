"""k-nearest-neighbour classification on frozen features, as DINO and DINOv2 report it (arXiv 2104.14294, 2304.07193).

Cosine similarity of the query with every gallery image; the k nearest vote with weight exp(similarity / temperature)
for their class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from eval.features import Encoder
from eval.texts import TextEncoder

VERSION = 1  # incremented by changes that can affect scores


@dataclass
class Config(Section):
    k: int = option(10, low=1)  # number of neighbours that vote; in a smaller gallery all images vote
    temperature: float = option(0.07, above=0)  # of the weights of votes


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy": share of query images whose class wins the vote, "balanced_accuracy": its mean over classes}."""
    known, asked = encoder.labelled(gallery), encoder.labelled(query)
    names = sorted(set(known.labels))
    classes = torch.tensor([names.index(label) for label in known.labels])
    predicted = classify(known.features, classes, asked.features, cfg.k, cfg.temperature)
    return accuracies(predicted, asked.labels, names)


def classify(gallery: Tensor, classes: Tensor, query: Tensor, k: int, temperature: float, chunk: int = 1024) -> Tensor:
    """Class numbers [Q] for query features [Q, D] from gallery features [N, D] with class numbers [N]; memory grows
    with `chunk` · N."""
    gallery, k = F.normalize(gallery, dim=1), min(k, len(gallery))
    votes = []
    for part in F.normalize(query, dim=1).split(chunk):
        similarity, nearest = (part @ gallery.T).topk(k)  # [chunk, k]
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        count = torch.zeros(len(part), int(classes.max()) + 1).scatter_add_(1, classes[nearest], weight)
        votes.append(count.argmax(1))
    return torch.cat(votes)


def accuracies(predicted: Tensor, labels: list[str], names: list[str]) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy"} of predicted class numbers [Q], which index `names`, against the Q `labels`.

    A label that is not among `names`, the gallery's classes, counts as wrong.
    """
    right = torch.tensor(
        [names[int(p)] == label for p, label in zip(predicted, labels, strict=True)], dtype=torch.float64
    )
    per_class = [right[[i for i, label in enumerate(labels) if label == name]].mean() for name in sorted(set(labels))]
    return {"accuracy": right.mean().item(), "balanced_accuracy": torch.stack(per_class).mean().item()}
