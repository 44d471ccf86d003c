"""The ends of files that a run writes, without reading the whole of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from common.untrusted import loads, open_binary

BYTES = 1 << 16  # read from the end of a file


def tail(path: Path, count: int) -> list[str]:
    """The last `count` whole lines of a file; [] if it cannot be read."""
    try:
        with open_binary(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - BYTES))
            lines = file.read(BYTES).decode(errors="replace").split("\n")
    except OSError:
        return []
    whole = lines[1:] if size > BYTES else lines
    return [line for line in whole if line.strip()][-count:] if count > 0 else []


def last_row(path: Path) -> dict[str, Any]:
    """The last row of a .jsonl file that has a "step"; {} if there is none."""
    for line in reversed(tail(path, 200)):
        try:
            row = loads(line)
        except ValueError:  # half of a line, of a process that was killed
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return {}


def last_step(run: Path) -> int:
    """The number of steps in metrics.jsonl: the last row's step + 1."""
    return last_row(run / "metrics.jsonl").get("step", -1) + 1
