"""Reads the .jsonl files of a run: metrics.jsonl, results.jsonl, samples.jsonl and others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from common.untrusted import loads, open_binary, schema_error

# {name of a file: schema of its lines in addition to "step", see `schema_error`}; further keys are allowed.
ROW_SCHEMAS: dict[str, dict[str, Any]] = {
    "metrics.jsonl": {"?samples_per_second": float},
    "results.jsonl": {
        **{"model": str, "protocol": str, "split": str, "metric": str, "value": object},
        **{"?count": int, "?gallery_count": int, "?left_out": int, "?passed_over": int, "?unit": str},
        **{"?seconds": float, "?note": str},
    },
    "samples.jsonl": {"prompt": str, "text": str},
}
MAX_STEP = 1 << 53  # above it a float64 no longer represents every step


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; [] if the file does not exist.

    A line that is not a row as ROW_SCHEMAS describes it is skipped, because a killed process may leave half a line, and
    users may edit these files.
    """
    return [*iterate_rows(path)]


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Iterates over the rows that `read_rows` returns, without keeping them in memory."""
    if not path.is_file():
        return
    with path.open(errors="replace") as file:
        for line in file:
            if (row := _row(line, path.name)) is not None:
                yield row


class NewRows:
    """Reads rows as they are appended. If the file was replaced (a resumed run truncates metrics.jsonl), reading starts
    again at its first row."""

    def __init__(self, path: Path):
        self.path = path
        self.replaced = False  # whether the last `read` has begun at the first row of a file
        self._file: IO[bytes] | None = None
        self._part = b""  # a line whose end has not been written yet

    def read(self) -> Iterator[dict[str, Any]]:
        """Iterates over the rows since the last call, without keeping them in memory; those that `read_rows` skips are
        left out. `replaced` is set before the first row."""
        self.replaced = False
        with contextlib.suppress(OSError):  # it does not exist yet
            if self._file is None or os.stat(self.path).st_ino != os.fstat(self._file.fileno()).st_ino:
                self._file, self._part, self.replaced = open_binary(self.path), b"", True
        return self._rows()

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            for line in self._file or ():
                self._part += line
                if not line.endswith(b"\n"):
                    return
                whole, self._part = self._part, b""
                if (row := _row(whole, self.path.name)) is not None:
                    yield row
        except OSError:  # of a network file system; the next call reads on
            return


def _row(line: str | bytes, name: str) -> dict[str, Any] | None:
    """The row in a line of the file `name`; None if it is none."""
    try:
        row = loads(line)
    except ValueError:
        return None
    return row if _is_row(row, ROW_SCHEMAS.get(name, {})) else None


def _is_row(row: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON value is an object that matches the schema, with a "step", with a number (or NaN) for "value" if
    it has one, and with integers that fit into 64 bits."""
    if schema_error(row, {"step": int, **schema}) or not 0 <= row["step"] < MAX_STEP:
        return False
    if type(row.get("value", 0)) not in (int, float):
        return False
    return all(not isinstance(value, int) or abs(value) < 1 << 63 for value in row.values())
