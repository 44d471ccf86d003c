"""Read the ends of files that a run writes, without reading the whole files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.untrusted import loads, open_binary

MAX_BYTES = 1 << 16  # number of bytes that are read from the end of a file


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines of a file, without empty ones; [] if it cannot be read."""
    try:
        with open_binary(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_BYTES))
            lines = file.read(MAX_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return []
    if size > MAX_BYTES:
        lines = lines[1:]  # the beginning of the first line was not read
    return [line for line in lines if line.strip()][-count:] if count > 0 else []


def last_row(path: Path) -> dict[str, Any]:
    """The last row of a .jsonl file that has a "step"; {} if there is none."""
    for line in reversed(tail(path, 200)):
        try:
            row = loads(line)
        except ValueError:  # an incomplete line, which a killed process has left
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return {}


def last_step(run: Path) -> int:
    """The number of trained steps: the step of the last row of metrics.jsonl + 1."""
    return last_row(run / "metrics.jsonl").get("step", -1) + 1
