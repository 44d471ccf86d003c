"""Checks the gallery and the query of a score: sets on which a score would mean nothing are refused, and other problems
become a note beside the score."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import DataError
from eval.texts import Labelled

FEW_QUERIES = 10  # with fewer, a single answer counts for more than ten percentage points


def judge(encoder: Any, gallery: list[str], query: list[str], unit: str) -> str:
    """The note for scores on a gallery and a query, or "". `unit`: the word for samples, such as images.

    Raises DataError if a score would mean nothing.
    """
    known, asked = encoder.labelled(gallery), encoder.labelled(query)
    gallery_name, query_name = ", ".join(gallery), ", ".join(query)
    classes, query_classes = sorted(set(known.labels)), sorted(set(asked.labels))
    if len(classes) < 2:
        raise DataError(
            f"{gallery_name}: its {len(known.labels)} {unit} are all of one class ({classes[0]}), so there is nothing to"
            " tell apart; name a gallery with two classes or more"
        )
    if not set(classes) & set(query_classes):
        raise DataError(
            f"{query_name}: has the classes {_some(query_classes)}, and the gallery {gallery_name} has none of them but"
            f" {_some(classes)}, so every answer would be wrong; name sets of the same classes"
        )
    for labelled in (known, asked):
        _check_finite(encoder, labelled, unit)
    notes, count = [], len(asked.labels)
    if shared := int(np.isin(asked.hashes[asked.hashes > 0], known.hashes).sum()):
        notes.append(f"{shared} of {np.count_nonzero(asked.hashes)} query {unit} are in the gallery, too")
    if unknown := sum(label not in set(classes) for label in asked.labels):
        notes.append(f"{unknown} of {count} query {unit} are of classes that the gallery lacks, and count as wrong")
    if len(query_classes) == 1:
        notes.append(f"the query {unit} are all of one class ({query_classes[0]})")
    if count < FEW_QUERIES:
        noun = unit if count > 1 else unit[:-1]
        notes.append(f"only {count} query {noun}, so one answer is {100 / count:.0f} points")
    if bool((known.features == known.features[0]).all()):
        notes.append(f"the features of all gallery {unit} are the same")
    return "; ".join(notes)


def _check_finite(encoder: Any, labelled: Labelled, unit: str) -> None:
    """Raises DataError if some features are NaN or infinite."""
    wrong = int((~labelled.features.isfinite().all(1)).sum())
    if wrong:
        raise DataError(
            f"{encoder.name}: its features of {wrong} of {len(labelled.labels)} {unit} are not finite; its weights may"
            " not be finite, either"
        )


def _some(names: list[str]) -> str:
    """The first three names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
