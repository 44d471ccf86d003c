"""A progress line, rewritten in place on a terminal, and printed as a new line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from common.output import discard_stdout, printable


class Progress:
    """`update(done, text)` prints done/total, the text, and the remaining time. `extra`: seconds of other work to add
    to the remaining time."""

    def __init__(self, name: str, total: int, done: int = 0, stream: TextIO | None = None):
        self.name, self.total, self.stream = name, total, stream or sys.stdout
        self.live = self.stream.isatty()
        self.began = time.monotonic()
        self.pace: tuple[float, int] | None = None  # (time, done) at the first update, which excludes the start-up
        self.printed_at = -float("inf")

    def update(self, done: int, text: str = "", extra: float = 0.0) -> None:
        now = time.monotonic()
        if self.pace is None:
            self.pace = (now, done)
        if done < self.total and now - self.printed_at < (0.2 if self.live else 10):
            return
        self.printed_at = now
        began, first = self.pace
        if done >= self.total:
            time_text = f"took {duration(now - self.began)}"
        elif done > first:
            remaining = (now - began) / (done - first) * (self.total - done) + extra
            time_text = f"{duration(remaining)} left"
        else:
            time_text = "starting"
        bar = "█" * (20 * done // max(1, self.total))
        line = f"{self.name} {bar:░<20} {done}/{self.total}  {text}{'  ' if text else ''}{time_text}"
        try:
            self.stream.write(f"\r\x1b[K{printable(line)}" if self.live else printable(line) + "\n")
            self.stream.flush()
        except BrokenPipeError:  # the work continues although the output is closed
            discard_stdout()

    def close(self) -> None:
        if self.live:
            self.stream.write("\n")


def duration(seconds: float) -> str:
    """ "2:05" or "1:02:05"."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
