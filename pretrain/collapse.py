"""Collapse, noticed while it begins: the class tokens of all images become alike, or the teacher's assignments say nothing.

Objectives that log `feature_std`, `rank` and `teacher_entropy` (`ops/self_distillation.health`) are watched; each kind is said once, with what the run
began with and what a healthy one begins with. The run goes on: whether to stop it is for a person to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 20  # rows in a row
POINT = 0.1  # of the feature_std that the run began with
DIRECTIONS = 1.5  # rank below which tokens lie on a line
SILENT = 0.995  # of ln K: assignments as even as if all images were the same
BEGINNING = 300  # steps in which that is nothing to speak of, or those of the learning rate's warm-up


class Watch:
    """Reads rows of metrics; `prototypes` is K, or None where there are none; `metrics` the file that a run which goes on has begun to write.

    `warmup`: steps of the learning rate's, in which a network that has hardly moved assigns all images alike.
    """

    def __init__(
        self, prototypes: int | None, say: Callable[[str], None], metrics: Path | None = None, warmup: int = 0
    ):
        self.beginning = max(BEGINNING, warmup)
        self.most = math.log(prototypes) if prototypes else None
        self.say = say
        self.first = _beginning(metrics) if metrics is not None else {}
        self.count: dict[str, int] = {}
        self.said: set[str] = set()

    def read(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for key in _watched(row):
                self._look(key, row[key], row["step"])

    def _look(self, key: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            return
        first = self.first.setdefault(key, value)
        kind = key.rpartition("/")[2]
        bad = {
            "feature_std": value < POINT * first,
            "rank": value < DIRECTIONS < first,
            "teacher_entropy": self.most is not None and value > SILENT * self.most and step >= self.beginning,
        }[kind]
        self.count[key] = self.count.get(key, 0) + 1 if bad else 0
        if self.count[key] >= PATIENCE and key not in self.said:
            self.said.add(key)
            self.say(f"step {step}: collapse: {self._reason(key, kind, value, first)}")

    def _reason(self, key: str, kind: str, value: float, first: float) -> str:
        was = f"{key} = {value:.3g}, {first:.3g} at the start of this run"
        if kind == "teacher_entropy":
            return (
                f"the teacher's assignments are the same for all images ({was}; ln K = {self.most:.3g}, a run that learns falls well below it in the first"
                " hundreds of steps); lower objective.teacher_temperature or the number of prototypes, or start with weights (init.backbone)"
            )
        return (
            f"the class tokens of all images are becoming alike ({was}; a fresh network has feature_std 0.1 to 0.9 and a rank of 3 or more); lower optim.lr,"
            " raise objective.momentum or objective.koleo_weight, or train with a larger batch"
        )


def _watched(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key.rpartition("/")[2] in ("feature_std", "rank", "teacher_entropy")]


def _beginning(metrics: Path) -> dict[str, float]:
    """What the run began with: its first row, not the first one after a restart, where it may have collapsed already."""
    if not metrics.is_file():
        return {}
    with metrics.open(errors="replace") as file:
        try:
            row = json.loads(file.readline())
        except ValueError:  # a killed process leaves half of a line
            return {}
    return {key: row[key] for key in _watched(row) if math.isfinite(row[key])}
