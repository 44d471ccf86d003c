"""Score a frozen model: `evaluate("runs/demo/export/600", ["knn", "linear"], gallery=[…], query=[…])` returns one row
for each metric."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import build_config
from common.errors import UserError
from eval.protocol_finder import LABELS, TOKENS, needs, protocols
from eval.results import Row

COUNTS = ("gallery_count", "count", "left_out", "passed_over", "unlabelled")  # numbers of samples in a row


def check(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not the name of a protocol."""
    for name in names:
        needs(name)


def evaluate(
    model: str | Path,
    names: Sequence[str],
    gallery: Sequence[str],
    query: Sequence[str],
    split: str = "test",
    image_size: int | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    keep_features: bool = True,
) -> list[Row]:
    """A row for every metric of every protocol.

    `model`: an exported folder, "pixels", "bytes" or "log_mel". `options`: of protocols, as in {"knn": {"k": 20}}.
    `device`: where features and scores are computed; auto: the best one. `cache`: the folder in which features are
    kept; None: the user's cache folder. `keep_features`: otherwise they are deleted when all scores are known. The
    `note` of a row names problems of the data that make its score less meaningful. Raises DataError for data for which
    a score would be meaningless, and UserError for a protocol that does not fit the model.
    """
    found = by_protocol(model, names, gallery, query, split, image_size, options, device, cache, keep_features)
    return [row for _, score in found for row in score()]


def by_protocol(
    model: str | Path,
    names: Sequence[str],
    gallery: Sequence[str],
    query: Sequence[str],
    split: str,
    image_size: int | None,
    options: dict[str, dict[str, Any]] | None,
    device: str,
    cache: str | Path | None,
    keep_features: bool,
) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """(name of a protocol, function that computes its rows), for the arguments of `evaluate`. One protocol can fail and
    the next one succeed."""
    encoder, facts, chosen = configured(model, names, image_size, options, device, cache)
    for name, protocol, cfg in chosen:
        yield name, partial(rows_of, encoder, facts["step"], name, protocol, cfg, list(gallery), list(query), split)
    if not keep_features:
        encoder.delete_features()


def rows_of(
    encoder: Any, step: int, name: str, protocol: Any, cfg: Any, gallery: list[str], query: list[str], split: str
) -> list[Row]:
    """The rows of one protocol: `name`, its module, and its config."""
    from eval import score_checks

    if needs(name) != LABELS and encoder.unit != ("texts" if needs(name) == TOKENS else "images"):
        others = " or ".join(other for other, needed in protocols().items() if needed == LABELS)
        raise UserError(f"{encoder.name}: reads {encoder.unit}, which {name} does not score; choose {others}")
    start = time.perf_counter()
    is_labelled = needs(name) == LABELS
    note = ""
    if is_labelled:
        are_apart = not hasattr(protocol, "splits") or not protocol.splits(cfg)
        note = score_checks.judge(encoder, gallery, query, encoder.unit, are_apart)
    scores = protocol.run(encoder, gallery, query, cfg)
    remarks = [text for key, text in getattr(protocol, "REMARKS", {}).items() if scores.pop(key)]
    note = "; ".join(each for each in (note, *remarks) if each)
    head = {"model": encoder.name, "step": step, "protocol": name, "version": protocol.VERSION, "split": split}
    counts = _labelled_counts(encoder, gallery, query) if is_labelled else _own_counts(protocol, encoder, scores)
    data = {"gallery": gallery, "query": query, **counts}
    data |= {"note": note} if note else {}
    seconds = round(time.perf_counter() - start, 2)
    return [
        head | {"metric": metric, "value": round(value, 6)} | data | {"seconds": seconds}
        for metric, value in scores.items()
    ]


def configured(
    model: str | Path,
    names: Sequence[str],
    image_size: int | None,
    options: dict[str, dict[str, Any]] | None,
    device: str,
    cache: str | Path | None,
) -> tuple[Any, dict[str, Any], list[tuple[str, Any, Any]]]:
    """(encoder, facts about it, (name, module, config) of each protocol) for the arguments of `evaluate`."""
    check([*names, *(options or {})])
    from eval.features import open_encoder  # imports torch

    encoder, facts = open_encoder(str(model), image_size, device)
    encoder.cache = Path(cache) if cache else None
    chosen = []
    for name in names:
        protocol = importlib.import_module(f"eval.{name}")
        cfg = build_config.build(protocol.Config, (options or {}).get(name, {}), {"": "command line"}, name + ".")
        chosen.append((name, protocol, cfg))
    # One extraction stores what all of the protocols read.
    layers = [protocol.layers(cfg) for _, protocol, cfg in chosen if hasattr(protocol, "layers")]
    encoder.layers = min(max(layers, default=0), encoder.max_layers)
    return encoder, facts, chosen


def refuse_files(chosen: Sequence[tuple[str, Any]]) -> None:
    """Raises UserError if a protocol would write a file or folder (`save`), where several models are scored: each of
    them would write the same one. `chosen`: (name, config) of each protocol."""
    for name, cfg in chosen:
        if save := vars(cfg).get("save"):
            raise UserError(
                f"{name}.save = {save}: several models are scored here, and each would write it; leave it out, and write"
                f" it by `unlabeled eval MODEL {name} {name}.save={save}`"
            )


def _labelled_counts(encoder: Any, gallery: Sequence[str], query: Sequence[str]) -> dict[str, Any]:
    """The numbers of samples that were scored and that were not, and the word for samples ("unit")."""
    gallery_set, query_set = encoder.labelled(list(gallery)), encoder.labelled(list(query))
    return {
        "gallery_count": len(gallery_set),
        "count": len(query_set),
        "left_out": gallery_set.left_out + query_set.left_out,
        "passed_over": gallery_set.passed_over + query_set.passed_over,
        "unlabelled": gallery_set.unlabelled + query_set.unlabelled,
        "unit": encoder.unit,
    }


def _own_counts(protocol: Any, encoder: Any, scores: dict[str, float]) -> dict[str, Any]:
    """The same from a protocol that reads its samples itself: `run` returns those of COUNTS that are not 0 among its
    scores. `UNIT` of a protocol is the word for what it counts."""
    counts: dict[str, Any] = {name: int(scores.pop(name, 0)) for name in COUNTS}
    return counts | {"unit": getattr(protocol, "UNIT", encoder.unit)}
