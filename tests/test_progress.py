"""The remaining time in the progress line."""

from __future__ import annotations

import io

import pytest

from common import progress


def test_what_is_left_is_told_from_the_pace_and_not_from_the_start(monkeypatch: pytest.MonkeyPatch):
    """A start-up of five seconds, then a step every 10 ms: the estimate is not 500 times five seconds."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = progress.Progress("train", 500, stream=out)
    line.live = True
    for step in range(1, 501):
        now[0] = 5 + 0.01 * step
        line.update(step)
    shown = out.getvalue().split("\r\x1b[K")[1:]
    assert shown[0].endswith("1/500  starting") and "21/500" not in shown[0]
    assert shown[1].endswith("/500  0:05 left") and shown[-1].endswith("500/500  took 0:10")
