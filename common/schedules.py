"""Schedules of numbers such as the learning rate: a linear warm-up, followed by a constant or changing value. A
schedule is a value in a config, and a pure function of the step.

In a recipe: `lr: 1.0e-3` is constant; `lr: {kind: cosine, value: 1.0e-3, warmup: 0.1}` warms up over a tenth of the
run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from common.config import Facts, Section, option, option_if


def warmup(facts: Facts) -> float:
    """The number of warm-up steps for `warmup: auto`: ten epochs, but at most a tenth of the run."""
    return float(max(1, round(min(facts.steps / 10, 10 * facts.samples / facts.batch))))


@dataclass
class Schedule(Section):
    """A linear change from `start` to `value` in the first `warmup` steps, then a change from `value` to `final` until
    the last step, along the curve `kind`.

    `kind`: constant (`value` until the end); linear; cosine (half a period); wsd (warmup-stable-decay: constant, then a
    decay over the last `decay` steps, which is linear or follows 1 − sqrt(x), where x is the share of the decay that is
    over; arXiv 2405.18392).
    """

    # value after the warm-up; auto is allowed for the learning rate of a decoder only: see
    # pretrain/recipes/size_dial.py
    value: float | Literal["auto"]
    # the curve after the warm-up; wsd: constant, with a decay at the end
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    start: float = option_if(0.0, "warmup", unless=0)  # value at the beginning of the warm-up
    final: float = option_if(0.0, "kind", "linear", "cosine", "wsd")  # value at the last step
    # number of steps of the linear warm-up from `start` to `value`; below 1: a share of the run
    warmup: float | Literal["auto"] = option(0.0, low=0, auto=warmup)
    decay: float = option_if(
        0.2, "kind", "wsd", low=0
    )  # wsd: number of steps of the decay; below 1: a share of the run
    # wsd: the shape of the decay; 1-sqrt: 1 minus the square root of the share that is over
    shape: Literal["linear", "1-sqrt"] = option_if("linear", "kind", "wsd")
    steps: int | None = None  # number of steps of the schedule; null: those of the run
    # true: the schedule comes close to `start` and `final`, but no step has these values (which may be 0)
    open: bool = False

    def __call__(self, step: int) -> float:
        """The value at `step`, counted from 0.

        Warm-up reaches `value` at step `warmup`; `final` is reached at step `steps` - 1.
        """
        value, kind = self.value, self.kind
        if value == "auto":
            raise ValueError(
                "the value of a schedule is still auto; resolve the recipe before the schedule is used"
                " (pretrain/recipes/size_dial.py)"
            )
        if kind == "constant" and not self.warmup:
            return value
        # The first step has to read every field that has an effect, because `config.unread` is called after it and
        # reports fields that were never read.
        warmup, length = self.warmup_steps(), self._length()
        start = self.start if self.warmup else value
        final = self.final if kind != "constant" else value
        decay = self.decay if kind == "wsd" else 1.0
        if step < warmup:
            return start + (value - start) * (step + self.open) / (warmup + self.open)
        first = max(warmup, length - _steps(decay, length)) if kind == "wsd" else warmup
        progress = min(1.0, max(0.0, (step - first) / max(1, length - (not self.open) - first)))
        if kind == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        elif kind == "wsd" and self.shape == "1-sqrt":
            progress = math.sqrt(progress)
        return value + (final - value) * progress

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Yield (".field", number) for the values that the schedule takes; `final` and `start` only if it uses them."""
        own = vars(self)
        if own["value"] != "auto":
            yield ".value", own["value"]
        if own["kind"] != "constant":
            yield ".final", own["final"]
        if own["warmup"] != 0:
            yield ".start", own["start"]

    def warmup_steps(self) -> int:
        """The number of steps before `value` is reached."""
        if self.warmup == "auto":
            raise ValueError(
                "the warmup of a schedule is still auto; resolve the recipe before the schedule is used"
                " (pretrain/recipes/defaults.py)"
            )
        return _steps(self.warmup, self._length()) if self.warmup else 0

    def _length(self) -> int:
        if self.steps is None:
            raise ValueError(
                "the length of a schedule that is not constant is unknown; set `steps`, its number of steps"
            )
        return self.steps


def _steps(length: float, total: int) -> int:
    """A number of steps that may be stated as a share of `total`: `length` below 1 is a share."""
    return round(length * total) if length < 1 else int(length)
