"""The heartbeat of a job's supervisor: a file that it writes again and again, and that the ranks on other nodes read. If
the first node of the job is lost, the file no longer changes. The writer's thread goes on while the supervisor waits
for Slurm. The file is never truncated, and its content has a fixed length, so that it also changes on a full disk. This
module does not import torch."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PERIOD = 5.0  # seconds between two writes, and between two reads
MISSED = 8  # reads in a row that find the same content, after which the supervisor counts as lost


@contextlib.contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Context in which a thread writes the file."""
    end = threading.Event()

    def write() -> None:
        for beat in itertools.count():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                try:
                    os.pwrite(descriptor, f"{beat:012d} {time.time():020.3f}\n".encode(), 0)
                finally:
                    os.close(descriptor)
            if end.wait(PERIOD):
                return

    threading.Thread(target=write, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        end.set()


class Listener:
    """Tells whether the heartbeat in a file has ended. Reads are counted, not seconds, so that a file system that hangs
    for a minute does not look like a lost supervisor, and clocks need not agree."""

    def __init__(self, path: Path, missed: int = MISSED):
        self.path, self.missed, self.content, self.unchanged = path, missed, "", 0
        self.next = time.monotonic() + PERIOD

    def is_lost(self) -> bool:
        """Read the file if that is due. Returns True once after `missed` reads in a row with the same content, and again
        after as many."""
        if time.monotonic() < self.next:
            return False
        with contextlib.suppress(OSError, ValueError):
            content = self.path.read_text()
            # an empty file is one that a supervisor could not write yet, because the disk is full
            self.unchanged = self.unchanged + 1 if content and content == self.content else 0
            self.content = content
        self.next = time.monotonic() + PERIOD
        if self.unchanged < self.missed:
            return False
        self.unchanged = 0
        return True
