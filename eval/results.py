"""Results: one JSON row per score in results.jsonl; a row is appended, never changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[
    str, Any
]  # model, step, protocol, version, split, metric, value, gallery, gallery_count, query, count, left_out, seconds


MAIN = {
    "accuracy": "{:.1%}",
    "bits_per_byte": "{:.3f}",
}  # the metric of a protocol that stands for it, and how it is written


def append(path: Path, rows: list[Row]) -> None:
    """Add rows with one write, so that processes that score at the same time do not mix their lines."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if (size := os.fstat(handle).st_size) and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data  # a killed process left half a line: do not glue a row to it
        os.write(handle, data)
    finally:
        os.close(handle)


def table(rows: list[Row], split: str = "test") -> str:
    """Every model's main score by protocol, as text: a line per model; of several exports the last, of several rows the newest."""
    rows = sorted((r for r in rows if r["metric"] in MAIN and r["split"] == split), key=lambda r: r["step"])
    protocols = list(dict.fromkeys(r["protocol"] for r in rows))
    usual = ("pixels", "bytes", "untrained", "pretrained")
    models = [m for m in usual if any(r["model"] == m for r in rows)]
    models += sorted({r["model"] for r in rows} - set(usual))  # students
    wide = max([10, *(len(p) + 2 for p in protocols)])
    lines = [f"{split:<16}" + "".join(f"{p:>{wide}}" for p in protocols)]
    for model in models:
        last = {r["protocol"]: MAIN[r["metric"]].format(r["value"]) for r in rows if r["model"] == model}
        lines.append(f"{model:<16}" + "".join(f"{last.get(p, '-'):>{wide}}" for p in protocols))
    return "\n".join(lines)
