"""A progress line: rewritten in place on a terminal, a new line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """`update(done, text)` shows done/total, the text, and how long the rest takes; `extra` seconds of other work come on top of the rest."""

    def __init__(self, name: str, total: int, done: int = 0, stream: TextIO = sys.stdout):
        self.name, self.total, self.first, self.stream = name, total, done, stream
        self.live = stream.isatty()
        self.began = time.monotonic()
        self.shown = -float("inf")

    def update(self, done: int, text: str = "", extra: float = 0.0) -> None:
        now = time.monotonic()
        if done < self.total and now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        spent = now - self.began
        rest = spent / max(1, done - self.first) * (self.total - done) + extra
        left = f"{duration(rest)} left" if done < self.total else f"took {duration(spent)}"
        bar = "█" * (20 * done // max(1, self.total))
        line = f"{self.name} {bar:░<20} {done}/{self.total}  {text}{'  ' if text else ''}{left}"
        self.stream.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.live:
            self.stream.write("\n")


def duration(seconds: float) -> str:
    """ "2:05" or "1:02:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
