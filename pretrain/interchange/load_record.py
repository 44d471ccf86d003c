"""Record which weights were loaded into the networks of a run, for the log; and switch loading off for networks that
need no weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_loading = True  # False inside `skip_loading`
_records: list[LoadedWeights] | None = None  # the list of the innermost `record_loading`; None outside


@dataclass
class LoadedWeights:
    """A record of weights that were loaded."""

    source: Any  # a `weight_sources.Source`
    target: str  # what they were loaded into
    tensors: int  # number of tensors
    numbers: int  # number of elements in these tensors


@contextlib.contextmanager
def record_loading() -> Iterator[list[LoadedWeights]]:
    """Context in which `weights.load_into` and `weights.load_run` append a record of what they load to the list."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def record(source: Any, target: str, tensors: dict[str, Any]) -> None:
    """Append a record to the list of the innermost `record_loading`, if there is one."""
    if _records is not None:
        _records.append(LoadedWeights(source, target, len(tensors), sum(v.numel() for v in tensors.values())))


@contextlib.contextmanager
def skip_loading() -> Iterator[None]:
    """Context in which `weights.load_into` does nothing: for models whose weights will be loaded from a checkpoint, or
    that never compute anything."""
    global _loading
    outer, _loading = _loading, False
    try:
        yield
    finally:
        _loading = outer


def is_loading() -> bool:
    """Whether weights are loaded: False inside `skip_loading`."""
    return _loading


def report_loaded(records: list[LoadedWeights], mean: list[float], std: list[float]) -> list[str]:
    """The log lines about loaded weights, without repetitions, each followed by a warning if the source was trained
    with another normalisation of pixels than `mean` and `std` of this run."""
    lines = []
    for record in records:
        source = record.source
        step = f", step {source.about['step']}" if source.about.get("step") is not None else ""
        lines.append(
            f"weights from {source.where} ({source.layout}{step}): {record.target}, {record.tensors} tensors,"
            f" {record.numbers / 1e6:.2f} M numbers"
        )
        if source.states_normalisation and source.about.get("mean") and "in_channels" in vars(source.cfg):
            lines += _normalisation_warning(source, mean, std)
    return list(dict.fromkeys(lines))


def _normalisation_warning(source: Any, mean: list[float], std: list[float]) -> list[str]:
    """One line if a source's mean or std differs from this run's, else none."""
    theirs = {key: source.about[key] for key in ("mean", "std")}
    ours = {"mean": mean, "std": std}
    differing = [key for key in ours if any(abs(a - b) > 1e-3 for a, b in zip(theirs[key], ours[key], strict=False))]
    if not differing:
        return []
    stated = " and ".join(f"{key} {_without_spaces(values)}" for key, values in theirs.items())
    options = " ".join(f"data.{key}={_without_spaces(theirs[key])}" for key in differing)
    return [
        f"{source.where}: was trained on pixels with {stated}, which is not the normalisation of this run, so that its"
        f" features here differ from its own; write {options}"
    ]


def _without_spaces(values: list[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"
