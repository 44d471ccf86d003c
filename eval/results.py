"""The file results.jsonl, with one JSON row per score. Rows are appended and never changed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import output
from common.errors import UserError
from pretrain.interchange.run_facts import MAIN_METRICS
from pretrain.run_folder.jsonl_rows import read_rows

# Keys: model, step, protocol, version, split, metric, value, gallery, gallery_count, query, count, left_out (number of
# damaged samples), passed_over (number of samples without an image or a text), unlabelled (number of samples without a
# label), seconds, and note if there is a remark.
Row = dict[str, Any]

MODELS = ("pixels", "clip_pixels", "bytes", "log_mel", "untrained", "pretrained")  # in the order of tables
KEY = ("model", "step", "protocol", "split", "metric")  # of a row: which score it is


def append(path: Path, rows: list[Row]) -> None:
    """Add rows with one write, so that processes that score at the same time do not mix their lines. Raises UserError,
    and adds none, if not all can be written."""
    with _opened(path) as handle:
        _write(handle, path, rows)


def append_new(path: Path, rows: list[Row], key: tuple[str, ...] = KEY) -> bool:
    """Add those rows that the file does not hold, see `new_rows`, and return whether there are any.

    Of processes that have computed the same scores, such as a restarted one and one that was not ended, the first one
    writes them: they wait for each other by a lock on the file, where the file system has locks.
    """
    with _opened(path) as handle:
        new = new_rows(path, rows, key)
        _write(handle, path, new)
    return bool(new)


def new_rows(path: Path, rows: list[Row], key: tuple[str, ...] = KEY) -> list[Row]:
    """Those of the rows that differ from all rows of the file in the values of `key`."""
    known = {tuple(row[name] for name in key) for row in read_rows(path)}
    return [row for row in rows if tuple(row[name] for name in key) not in known]


def scored(path: Path) -> set[tuple[str, int, str, str]]:
    """(model, step, split, protocol) of the scores of which the file holds rows."""
    return {(row["model"], row["step"], row["split"], row["protocol"]) for row in read_rows(path)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a file of rows, for reading and appending, which is locked where the file system has locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: scores cannot be written ({error.strerror})") from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _write(handle: int, path: Path, rows: list[Row]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    size = os.fstat(handle).st_size
    if data and size and os.pread(handle, 1, size - 1) != b"\n":
        data = b"\n" + data  # after half a line, which a killed process has left
    try:
        if os.write(handle, data) == len(data):
            return
        reason = "the disk is full"
    except OSError as error:
        reason = error.strerror or str(error)
    os.ftruncate(handle, size)  # so that half of the rows do not pass for all of them
    raise UserError(f"{path}: scores cannot be written ({reason})")


def table(rows: list[Row], split: str = "test") -> str:
    """A text table of the main metrics: a line for each model, a column for each protocol.

    The last export of a model is used, and the newest of several rows for the same export.
    """
    rows = sorted((r for r in rows if r["metric"] in MAIN_METRICS and r["split"] == split), key=lambda r: r["step"])
    protocols = list(dict.fromkeys(r["protocol"] for r in rows))
    models = [m for m in MODELS if any(r["model"] == m for r in rows)]
    models += sorted({r["model"] for r in rows} - set(MODELS))  # students of a distillation
    width = max([10, *(len(p) + 2 for p in protocols)])
    cells = [[split, "".join(f"{p:>{width}}" for p in protocols)]]
    used: list[Row] = []
    for model in models:
        last = {r["protocol"]: r for r in rows if r["model"] == model}
        used += last.values()
        values = {protocol: MAIN_METRICS[r["metric"]].format(r["value"]) for protocol, r in last.items()}
        cells.append([model, "".join(f"{values.get(protocol, '-'):>{width}}" for protocol in protocols)])
    return "\n".join([*output.columns(cells, [16]), *notes(used)])


def lines(rows: list[Row]) -> list[str]:
    """One line of text for each row, followed by notes."""
    cells = [[r["model"], r["protocol"], r["metric"], f"{r['value']:.4f}   ({r['count']:,} {r['unit']})"] for r in rows]
    return [*output.columns(cells, [12, 10, 20]), *notes(rows)]


def notes(rows: list[Row]) -> list[str]:
    """Lines with the notes of rows and with the numbers of samples that were not scored, without repetitions."""
    out = [row["note"] for row in rows if row.get("note")]
    for row in rows:
        damaged, absent, unit = row.get("left_out", 0), row.get("passed_over", 0), row.get("unit", "images")
        unlabelled = row.get("unlabelled", 0)
        parts = []
        if damaged:
            parts.append(f"{damaged} damaged {unit} were left out")
        if absent:
            parts.append(f"{absent} samples without {unit} were skipped")
        if unlabelled:
            parts.append(f"{unlabelled} {unit} without a label were skipped")
        if parts:
            out.append(f"of gallery and query, {' and '.join(parts)}")
    return [f"note: {note}" for note in dict.fromkeys(out)]


def check_target(path: str) -> None:
    """Raises UserError for a path that does not name a .jsonl file. "" is accepted, because it stands for the
    default."""
    if path and (not path.endswith(".jsonl") or Path(path).is_dir()):
        raise UserError(f"--out {path}: write the name of a file that ends in .jsonl; rows are added to it")
