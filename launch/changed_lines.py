"""Log what is found again and again only once."""

from __future__ import annotations

import time
from collections.abc import Callable

REPEAT_SECONDS = 3600.0  # after which a line that has not changed is written again


class ChangedLines:
    """Writes a line with `say` if it differs from the last one about the same thing, or that one is REPEAT_SECONDS
    old."""

    def __init__(self, say: Callable[[str], object]):
        self.say = say
        self._last: dict[str, tuple[str, float]] = {}  # {what a line is about: (the line, time.monotonic())}

    def __call__(self, about: str, line: str) -> None:
        former, written = self._last.get(about, ("", 0.0))
        if line != former or time.monotonic() > written + REPEAT_SECONDS:
            self._last[about] = (line, time.monotonic())
            self.say(line)
