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
from eval.feature_rows import FeatureRows, chunks
from eval.features import Encoder
from eval.text_features import TextEncoder

NEEDS = "labels"
VERSION = 1  # is increased by every change that can affect scores
GALLERY_CHUNK = 1 << 16  # rows on the device at once
QUERY_BLOCK = 1 << 17  # queries for which the gallery is read once


@dataclass
class Config(Section):
    k: int = option(10, low=1)  # number of neighbours that vote; in a smaller gallery all images vote
    temperature: float = option(0.07, above=0)  # of the weights of votes


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"accuracy": share of query images whose class wins the vote, "balanced_accuracy": its mean over classes}."""
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    predicted = classify(
        gallery_set.features, gallery_set.classes, query_set.features, cfg.k, cfg.temperature, device=encoder.device
    )
    return accuracies(predicted, query_set.classes, query_set.names, gallery_set.names)


def cost(cfg: Config, gallery: int, query: int, dim: int, classes: int, layers: int = 0) -> tuple[float, float]:
    """(bytes on the device, floating-point operations), see `score_plan`."""
    similarities = 2 * 4 * 1024 * min(gallery, GALLERY_CHUNK)
    features = 2 * 4 * dim * (min(gallery, GALLERY_CHUNK) + min(query, QUERY_BLOCK))
    return similarities + features + 36.0 * cfg.k * min(query, QUERY_BLOCK), 2.0 * gallery * query * dim


def classify(
    gallery: FeatureRows | Tensor,
    classes: Tensor,
    query: FeatureRows | Tensor,
    k: int,
    temperature: float,
    chunk: int = 1024,
    gallery_chunk: int = GALLERY_CHUNK,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class numbers [Q], on the CPU, for query features [Q, D], from gallery features [N, D] with class numbers [N].

    Memory on the device: `gallery_chunk` · D features, `chunk` · `gallery_chunk` similarities, and features and
    neighbours of at most QUERY_BLOCK queries.
    """
    count, classes = int(classes.max()) + 1, classes.to(device)
    predicted = []
    for _, block in chunks(query, QUERY_BLOCK, device):
        similarities, neighbours = nearest(gallery, block, k, chunk, gallery_chunk)
        for similarity, nearest_rows in zip(similarities.split(chunk), neighbours.split(chunk), strict=True):
            weight = ((similarity - similarity[:, :1]) / temperature).exp()  # [chunk, k]
            votes = torch.zeros(len(weight), count, device=device)  # [chunk, C]
            predicted.append(votes.scatter_add_(1, classes[nearest_rows], weight).argmax(1).cpu())
    return torch.cat(predicted)


def nearest(
    gallery: FeatureRows | Tensor, query: Tensor, k: int, chunk: int = 1024, gallery_chunk: int = GALLERY_CHUNK
) -> tuple[Tensor, Tensor]:
    """(cosine similarities [Q, k], rows of the gallery [Q, k]) of the k nearest rows, the nearest first, for query
    features [Q, D]. In a gallery of N < k rows, k is N."""
    query, k = F.normalize(query, dim=1), min(k, len(gallery))
    best = query.new_full((len(query), k), -float("inf"))  # [Q, k]
    rows = torch.zeros(len(query), k, dtype=torch.long, device=query.device)
    for first, part in chunks(gallery, gallery_chunk, query.device):
        part = F.normalize(part, dim=1)
        for a in range(0, len(query), chunk):
            similarity, row = (query[a : a + chunk] @ part.T).topk(min(k, len(part)))  # [chunk, ≤ k]
            merged = torch.cat([best[a : a + chunk], similarity], 1)
            best[a : a + chunk], chosen = merged.topk(k)
            rows[a : a + chunk] = torch.cat([rows[a : a + chunk], row + first], 1).gather(1, chosen)
    return best, rows


def accuracies(predicted: Tensor, classes: Tensor, names: list[str], known: list[str]) -> dict[str, float]:
    """{"accuracy", "balanced_accuracy"} of predicted classes [Q], which are indices into `known`, the classes of the
    gallery, for queries with true classes [Q], indices into `names`.

    A query whose class is not among the known ones counts as wrong.
    """
    index = {name: n for n, name in enumerate(known)}
    truth = torch.tensor([index.get(name, -1) for name in names])[classes]  # [Q]
    correct = (predicted == truth).double()
    per_class = torch.bincount(classes, correct) / torch.bincount(classes)  # [classes]; NaN for one without queries
    return {"accuracy": correct.mean().item(), "balanced_accuracy": per_class.nanmean().item()}
