"""A schedule is a value in a config and a pure function of the step: warm up in a straight line, then stay or fall.

In a recipe: `lr: 1.0e-3` is constant; `lr: {kind: cosine, value: 1.0e-3, warmup: 0.1}` warms up over a tenth of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.config import Section


@dataclass
class Schedule(Section):
    """`start` → `value` in a straight line over `warmup` steps, then `value` → `final` by `kind` until step `steps`.

    `warmup` and `decay` are steps, or shares of the run where they are below 1; a learning rate's warmup may be `auto` (pretrain/auto.py), and a decoder's
    its value (pretrain/dial.py). `kind`: constant; linear; cosine (half a cosine);
    wsd (constant, then over the last `decay` by `shape`: a straight line, or 1 - sqrt of what is done, arXiv 2405.18392). `steps` is the length of the run unless it is given.
    """

    value: float | Literal["auto"] = 0.0
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    start: float = 0.0
    final: float = 0.0
    warmup: float | Literal["auto"] = 0.0
    decay: float = 0.2
    shape: Literal["linear", "1-sqrt"] = "linear"
    steps: int | None = None

    def __call__(self, step: int) -> float:
        """The value at `step`, counted from 0. Warm-up reaches `value` at step `warmup`; `final` is reached at step `steps` - 1."""
        value, kind = self.value, self.kind
        if value == "auto":
            raise ValueError("a schedule whose value is auto has to be settled first (pretrain/dial.py)")
        if kind == "constant" and not self.warmup:
            return value
        # every field that can matter is read at every step, so that `config.unread` tells the truth after the first one
        warmup, length = self.warmup_steps(), self._length()
        start = self.start if self.warmup else value
        final = self.final if kind != "constant" else value
        decay = self.decay if kind == "wsd" else 1.0
        if step < warmup:
            return start + (value - start) * step / warmup
        first = max(warmup, length - _steps(decay, length)) if kind == "wsd" else warmup
        done = min(1.0, max(0.0, (step - first) / max(1, length - 1 - first)))
        if kind == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        elif kind == "wsd" and self.shape == "1-sqrt":
            done = math.sqrt(done)
        return value + (final - value) * done

    def warmup_steps(self) -> int:
        """The steps before `value` is reached."""
        if self.warmup == "auto":
            raise ValueError("a schedule whose warmup is auto has to be settled first (pretrain/auto.py)")
        return _steps(self.warmup, self._length()) if self.warmup else 0

    def _length(self) -> int:
        if self.steps is None:
            raise ValueError("a schedule that is not constant needs `steps`, the length of the run")
        return self.steps


def _steps(length: float, total: int) -> int:
    return round(length * total) if length < 1 else int(length)
