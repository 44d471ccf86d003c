"""A file to which a run appends lines (metrics, log, damage log). No line is lost if the disk is full for some time."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from common.output import say


class LineFile:
    """Appends lines to a file.

    Lines that cannot be written are kept in memory, reported once on standard error, and written by a later call.
    """

    def __init__(self, path: Path, durable: bool = False):
        self.path, self.durable = path, durable
        self.waiting = b""
        self._warned = False

    def add(self, text: str = "") -> bool:
        """Append text. Returns whether this text and all text of earlier calls is in the file."""
        self.waiting += text.encode(errors="surrogateescape")
        try:
            with contextlib.suppress(FileExistsError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                while self.waiting:
                    written = os.write(number, self.waiting)
                    self.waiting = self.waiting[written:]
                if self.durable:
                    os.fsync(number)
            finally:
                os.close(number)
        except OSError as error:
            if not self._warned:
                say(
                    f"{self.path}: cannot be written ({error.strerror}); lines are kept in memory until it can",
                    file=sys.stderr,
                )
            self._warned = True
            return False
        self._warned = False
        return True
