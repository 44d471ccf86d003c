"""Warns when a run collapses: the class tokens of all images become alike, or the teacher assigns all images to the
same classes.

It reads the logged quantities `feature_std`, `rank` and `teacher_entropy` (`ops/self_distillation.health`). It warns
once per quantity, with the value at the start of the run and the usual range. The run continues; a person decides
whether to stop it. `of_health` judges the numbers of an export that the protocol `health` has measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.run_folder.jsonl_rows import iterate_rows

PATIENCE = 20  # number of consecutive rows of metrics that must look collapsed before the warning
MIN_FEATURE_STD_RATIO = 0.1  # smallest healthy ratio of feature_std to its value at the start of the run
MIN_RANK = 1.5  # below it, the class tokens lie almost on a line
MIN_RANK_RATIO = 0.25  # smallest healthy ratio of rank − 1 to its value at the start, which is low in narrow networks
MAX_ENTROPY_SHARE = 0.995  # largest healthy share of teacher_entropy in ln K, which it reaches if all images are alike
OF_HEALTH = {"std": "feature_std", "rankme": "rank"}  # {number of the protocol `health`: its logged quantity}
GRACE_STEPS = 300  # a high entropy is normal in these first steps, or in the learning rate's warm-up if that is longer


class CollapseMonitor:
    """Reads rows of metrics in the order of their steps.

    classes   the number K of the teacher's classes, or None if the objective has no such classes
    metrics   the metrics file of a resumed run, which holds the values at the start of the run
    warmup    number of steps of the learning rate's warm-up, during which a nearly untrained network assigns all images
              to the same classes
    remedies  {quantity: which options of the objective to change} (`pretrain.objectives.options.Options`)
    """

    def __init__(
        self,
        classes: int | None,
        say: Callable[[str], None],
        metrics: Path | None = None,
        warmup: int = 0,
        remedies: Mapping[str, str] | None = None,
    ):
        self.remedies = remedies or {}
        self.grace_steps = max(GRACE_STEPS, warmup)
        self.max_entropy = math.log(classes) if classes else None
        self.say = say
        self.first = _values_at_start(metrics) if metrics is not None else {}
        self.count: dict[str, int] = {}  # consecutive rows that look collapsed, by quantity
        self.warned: dict[str, int] = {}  # the step of the warning, by quantity

    def read(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for key in _monitored(row):
                self._check(key, row[key], row["step"])

    def _check(self, key: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            return
        first = self.first.setdefault(key, value)
        kind = key.rpartition("/")[2]
        looks_collapsed = {
            "feature_std": value < MIN_FEATURE_STD_RATIO * first,
            "rank": _low_rank(value, first),
            "teacher_entropy": self.max_entropy is not None
            and value > MAX_ENTROPY_SHARE * self.max_entropy
            and step >= self.grace_steps,
        }[kind]
        self.count[key] = self.count.get(key, 0) + 1 if looks_collapsed else 0
        if self.count[key] >= PATIENCE and key not in self.warned:
            self.warned[key] = step
            self.say(f"step {step}: collapse: {self._reason(key, kind, value, first)}")

    def verdict(self) -> str:
        """When the run collapsed, in which quantities, which of them recovered by the last row, and what that means for
        its exports; "" for a healthy run."""
        if not self.warned:
            return ""
        recovered = [key for key in self.warned if self.count[key] < PATIENCE]
        if len(recovered) == len(self.warned):
            end = "and recovered; compare the scores of its exports with those of step 0"
        else:
            some = f"of these, {', '.join(recovered)} recovered; " if recovered else ""
            end = f"and was still collapsed at the end; {some}its exports are of little use"
        return f"collapsed at step {min(self.warned.values())} ({', '.join(self.warned)}), {end}"

    def _reason(self, key: str, kind: str, value: float, first: float) -> str:
        remedy = self.remedies.get(kind, "")
        values = f"{key} = {value:.3g}, {first:.3g} at the start of this run"
        if kind == "teacher_entropy":
            return (
                f"the teacher's assignments are the same for all images ({values}; ln K = {self.max_entropy:.3g}, and"
                " in a healthy run it falls well below that in the first hundreds of steps);"
                f" {remedy + ', or ' if remedy else ''}start from trained weights (init.backbone)"
            )
        return (
            f"the class tokens of all images are becoming alike ({values}; an untrained ViT of usual width"
            f" has a feature_std of 0.1 to 0.9 and a rank of 3 or more); {_advice(remedy)}"
        )


def verdict(rows: list[dict[str, Any]], classes: int | None, warmup: int) -> str:
    """`CollapseMonitor.verdict` on the rows of a whole run."""
    monitor = CollapseMonitor(classes, lambda _: None, warmup=warmup)
    monitor.read(rows)
    return monitor.verdict()


def of_health(values: Mapping[str, float], first: Mapping[str, float], remedies: Mapping[str, str]) -> str:
    """Why the features of an export look collapsed, and what to change; "" if they do not. `values`, `first`: the numbers
    of the protocol `health`, of the export and of the untrained network."""
    looks_collapsed = {
        "std": values["std"] < MIN_FEATURE_STD_RATIO * first["std"],
        "rankme": _low_rank(values["rankme"], first["rankme"]),
    }
    found = [name for name, looks in looks_collapsed.items() if looks]
    if not found:
        return ""
    compared = ", ".join(f"{name} {values[name]:.3g}, untrained {first[name]:.3g}" for name in found)
    return (
        f"the features of all images are becoming alike ({compared}); {_advice(remedies.get(OF_HEALTH[found[0]], ''))}"
    )


def _low_rank(value: float, first: float) -> bool:
    """Whether a rank looks collapsed beside the rank at the start."""
    return value < MIN_RANK and value - 1 < MIN_RANK_RATIO * (first - 1)


def _advice(remedy: str) -> str:
    return f"lower optim.lr, {remedy + ', ' if remedy else ''}or train with a larger batch"


def _monitored(row: dict[str, Any]) -> list[str]:
    names = ("feature_std", "rank", "teacher_entropy")
    return [key for key, value in row.items() if key.rpartition("/")[2] in names and isinstance(value, int | float)]


def _values_at_start(metrics: Path) -> dict[str, float]:
    """The values in the first row of the metrics file, because the run may have collapsed before it was resumed."""
    row = next(iterate_rows(metrics), {})
    return {key: row[key] for key in _monitored(row) if math.isfinite(row[key])}
