"""Check the gallery and the query of a score. Sets for which a score would be meaningless are refused; other problems
are noted beside the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.errors import DataError
from eval.feature_cache import PIECE
from eval.feature_rows import chunks

MIN_QUERIES = 10  # with fewer, a single answer changes the accuracy by more than ten percentage points


def judge(encoder: Any, gallery: list[str], query: list[str], unit: str, are_apart: bool = True) -> str:
    """The note for scores on a gallery and a query; "" if there is no problem. `unit`: the word for samples, such as
    "images". `are_apart`: whether a sample should not be in both.

    Raises DataError if a score would be meaningless.
    """
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    gallery_name, query_name = ", ".join(gallery), ", ".join(query)
    classes, query_classes = gallery_set.names, query_set.names
    if len(classes) < 2:
        raise DataError(
            f"{gallery_name}: its {len(gallery_set)} {unit} are all of one class ({classes[0]}), so every answer"
            " would be the same; name a gallery with two classes or more"
        )
    if not set(classes) & set(query_classes):
        raise DataError(
            f"{query_name}: has the classes {_some(query_classes)}, but the gallery {gallery_name} has"
            f" {_some(classes)}, so every answer would be wrong; name sets with the same classes"
        )
    for labelled in (gallery_set, query_set):
        if labelled.not_finite:
            raise DataError(
                f"{encoder.name}: its features of {labelled.not_finite} of {len(labelled)} {unit} are not finite; its"
                " weights may not be finite, either"
            )
    notes, count = [], len(query_set)
    if are_apart and (shared := int(np.isin(query_set.hashes[query_set.hashes > 0], gallery_set.hashes).sum())):
        notes.append(f"{shared} of {np.count_nonzero(query_set.hashes)} query {unit} are in the gallery, too")
    lacking = set(query_classes) - set(classes)
    is_unknown = torch.tensor([name in lacking for name in query_classes])  # [classes of the queries]
    if unknown := int(is_unknown[query_set.classes].sum()):
        notes.append(f"{unknown} of {count} query {unit} are of classes that the gallery lacks, and count as wrong")
    if len(query_classes) == 1:
        notes.append(f"the query {unit} are all of one class ({query_classes[0]})")
    if count < MIN_QUERIES:
        noun = unit if count > 1 else unit[:-1]
        notes.append(f"only {count} query {noun}, so one answer is {100 / count:.0f} points")
    features = gallery_set.features
    if all(bool((part == features[:1]).all()) for _, part in chunks(features, PIECE)):  # ends at the first difference
        notes.append(f"the features of all gallery {unit} are the same")
    return "; ".join(notes)


def is_at_edge(scores: Sequence[float]) -> bool:
    """Whether the first or the last value of a sorted grid of at least three has a better score than all others, so
    that a value beyond the grid may be better still."""
    return len(scores) > 2 and max(scores) > max(scores[1:-1])


def _some(names: list[str]) -> str:
    """The first three names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
