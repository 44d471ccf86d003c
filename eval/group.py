"""Accuracy by groups of a metadata field (site, sensor, patient): the worst group, and the mean over groups.

A model that is good on average may fail for one hospital or one camera (worst-group accuracy: Sagawa et al., arXiv
1911.08731; groups of domains: WILDS, 2012.07421). A classifier is fitted on the gallery, and its accuracy is computed
for the queries of each group, by a field of their .json member. With `apart`, no value of another field, such as the
patient, is on both sides: gallery samples that share it with a query are left out, or, with `folds`, one set is split
by it for cross-validation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.config import Section, option
from common.errors import Damaged, DataError, UserError
from common.untrusted import loads
from data_pipeline.shards.samples import Samples
from eval import knn, logistic
from eval.feature_cache import Labelled, read_batches
from eval.feature_rows import Subset
from eval.features import Encoder
from eval.text_features import TextEncoder

NEEDS = "labels"
VERSION = 1
REMARKS = {
    "small_groups": "groups with fewer queries than group.least do not count for the worst group and the mean",
    "shared": "gallery samples with the same value of group.apart as a query were left out",
}


@dataclass
class Config(Section):
    field: str = ""  # of the .json member, whose values are the groups
    apart: str = ""  # field whose values are never on both sides, such as patient; empty: none
    folds: int = option(0, low=0)  # parts of a cross-validation on the query set alone; 0: gallery and query as given
    least: int = option(10, low=1)  # queries of a group that counts
    classifier: Literal["logistic", "knn"] = "logistic"
    cost: float = option(1.0, above=0)  # C of the logistic regression
    k: int = option(10, low=1)  # neighbours that vote
    iterations: int = option(1000, low=1)  # of the logistic regression, at most

    def check(self) -> None:
        if self.folds == 1:
            raise ValueError("folds = 1: write 2 or more, or 0 to use gallery and query as they are")


def splits(cfg: Config) -> bool:
    """Whether gallery and query are one set, which the protocol splits."""
    return cfg.folds > 0


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises UserError if no field is named, or if the first sample has none of this name."""
    samples = Samples(shards)
    _check_field(samples, 0, cfg)
    for name, key in ((cfg.field if role == "query" else "", "group.field"), (cfg.apart, "group.apart")):
        if name:
            values_of(samples, np.arange(1), name, key)


def _check_field(samples: Samples, number: int, cfg: Config) -> None:
    """Raises UserError, with the fields of a sample, if no field is named."""
    if not cfg.field:
        known = ", ".join(sorted(_fields(samples, number))) or "there are none"
        raise UserError(f"group.field is empty; write a field of the .json members: {known}")


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"worst_group", "mean_group", "average": of all queries, "groups": number of groups that count}, and the names of
    REMARKS: whether the remark applies."""
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    samples = encoder.check(query)
    _check_field(samples, int(query_set.numbers[0]), cfg)
    groups = values_of(samples, query_set.numbers, cfg.field, "group.field")
    own = {name: n for n, name in enumerate(gallery_set.names)}
    truth = torch.tensor([own.get(name, -1) for name in query_set.names])[query_set.classes]  # [Q]
    shared = False
    if cfg.folds:
        keys = values_of(samples, query_set.numbers, cfg.apart or cfg.field, "group.apart")
        if gallery != query:
            raise UserError("group.folds splits one set; write the same shards for gallery and query")
        predicted = _cross_validated(query_set, folds_of(keys, cfg.folds), cfg, encoder.device)
    else:
        kept = torch.arange(len(gallery_set))
        if cfg.apart:
            theirs = values_of(encoder.check(gallery), gallery_set.numbers, cfg.apart, "group.apart")
            seen = set(values_of(samples, query_set.numbers, cfg.apart, "group.apart"))
            kept = torch.tensor([n for n, value in enumerate(theirs) if value not in seen], dtype=torch.long)
            shared = len(kept) < len(theirs)
            if len(gallery_set.classes[kept].unique()) < 2:
                raise DataError(
                    f"{', '.join(gallery)}: without the samples whose {cfg.apart} is also in the query, fewer than two"
                    " classes are left; write the same shards for both, and group.folds=5"
                )
        predicted = _classify(gallery_set, kept, query_set.features, cfg, encoder.device)
    scores, small = by_group(predicted == truth, groups, cfg.least)
    return scores | {"small_groups": small, "shared": shared}


def by_group(correct: Tensor, groups: Sequence[str], least: int) -> tuple[dict[str, float], bool]:
    """(scores from whether each of Q queries is right and its group, whether a group has fewer than `least` queries)."""
    counts = Counter(groups)
    large = sorted(name for name, count in counts.items() if count >= least)
    if not large:
        raise DataError(f"no group has group.least = {least} queries; the largest one has {max(counts.values())}")
    index = {name: n for n, name in enumerate(large)}
    number = torch.tensor([index.get(name, len(large)) for name in groups])
    right = torch.bincount(number, correct.double(), minlength=len(large) + 1)[: len(large)]
    accuracy = right / torch.tensor([counts[name] for name in large])
    scores = {
        "worst_group": accuracy.min().item(),
        "mean_group": accuracy.mean().item(),
        "average": correct.double().mean().item(),
        "groups": len(large),
    }
    return scores, len(large) < len(counts)


def folds_of(values: Sequence[str], folds: int) -> Tensor:
    """The fold [N] of each sample, so that samples of one value are in one fold and folds are about equally large: the
    values, the most frequent one first, go to the fold that is the smallest until then."""
    counts = Counter(values)
    if len(counts) < folds:
        raise UserError(f"group.folds = {folds}: the field has {len(counts)} values; write at most as many folds")
    sizes, fold_of = [0] * folds, dict[str, int]()
    for value, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        fold_of[value] = sizes.index(min(sizes))
        sizes[fold_of[value]] += count
    return torch.tensor([fold_of[value] for value in values])


def _cross_validated(found: Labelled, fold: Tensor, cfg: Config, device: torch.device) -> Tensor:
    """The class [N] that is predicted for each sample from those of the other folds."""
    predicted = torch.zeros(len(found), dtype=torch.long)
    for n in range(int(fold.max()) + 1):
        inside, outside = (fold == n).nonzero().flatten(), (fold != n).nonzero().flatten()
        predicted[inside] = _classify(found, outside, Subset(found.features, inside), cfg, device)
    return predicted


def _classify(found: Labelled, kept: Tensor, query: Any, cfg: Config, device: torch.device) -> Tensor:
    """Class numbers [Q] of query features, from some samples of the gallery."""
    features, classes = Subset(found.features, kept), found.classes[kept]
    if cfg.classifier == "knn":
        return knn.classify(features, classes, query, cfg.k, knn.Config().temperature, device=device)  # type: ignore[arg-type]
    options = logistic.Config(iterations=cfg.iterations)
    weight, bias, _ = logistic.fit(features, classes, len(found.names), cfg.cost, options, device)
    return logistic.predict(query, weight, bias)


# ---------------------------------------------------------------- fields
def values_of(samples: Samples, numbers: np.ndarray, name: str, key: str) -> list[str]:
    """The value of a field, as text, of each sample. Raises DataError if a sample has none."""
    out: list[str] = []
    for of_batch, found in read_batches(partial(_fields, samples), numbers, 1024):  # type: ignore[arg-type]
        for number, fields in zip(of_batch, found, strict=True):
            if fields.get(name) is None:
                known = f"it has {', '.join(sorted(fields))}" if fields else "it has no .json member"
                raise DataError(f"{samples.names}: sample {number} has no {name} ({key}); {known}")
            out.append(str(fields[name]))
    return out


def _fields(samples: Samples, number: int) -> dict[str, Any]:
    """The .json member of a sample; empty if it has none, or it cannot be read."""
    try:
        found = loads(samples.read(int(number), ("json",)).get("json", b"{}"))
    except (Damaged, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
