"""Replaces every `auto` of a recipe by a value, by the rule of its option (`common.config.option`).

The stored recipe of a run has the values, and `keep` copies them when the run is resumed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from common.config import Facts, Section, fields
from common.schedules import Schedule
from pretrain.recipes.recipe import Recipe

AUTO = "auto"


def settle(cfg: Recipe, samples: int | None = None, recipe_of: Callable[[str], dict] | None = None) -> list[str]:
    """Replace every `auto` that has a rule. Returns a line "key = value (auto: rule)" for each.

    `samples`: number of samples in the data; None if unknown: then as many as the run trains on. `recipe_of` reads the
    recipe of the run that `init.run` names.
    """
    stored = vars(cfg)
    steps, batch, start = stored["steps"], vars(stored["data"])["batch"], vars(stored["init"])["run"]
    known = Facts(steps, batch, samples or steps * batch, vars(stored["model"]))
    lines: list[str] = []

    @functools.cache
    def before() -> dict[str, Any]:
        return recipe_of(start) if start and recipe_of is not None else {}

    def walk(section: Section, path: tuple[str, ...]) -> None:
        for key, field in fields(type(section)).items():
            value = vars(section)[key]
            if isinstance(value, Section):
                walk(value, (*path, key))
            elif value == AUTO:
                facts = dataclasses.replace(
                    known, key=key, beside=vars(section), before=lambda: _inside(before(), path)
                )
                for rule in field.metadata.get("auto", ()):
                    if (new := rule(facts)) is not None:
                        setattr(section, key, new)
                        words = (rule.__doc__ or rule.__name__).splitlines()[0].rstrip(".")
                        lines.append(f"{'.'.join((*path, key))} = {_shown(new)} (auto: {words})")
                        break

    walk(cfg, ())
    return lines


def _inside(values: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """The section at a path of a recipe's plain values; {} if there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _shown(value: Any) -> Any:
    """A value as text; for a schedule, its first and its last value."""
    if not isinstance(value, Schedule):
        return value
    if value.kind != "constant":
        return f"{value.value:g} → {value.final:g}"
    return f"{value.start:g} → {value.value:g} over {value.warmup:g} steps" if value.warmup else f"{value.value:g}"


def keep(old: Section, new: Section) -> None:
    """Replace every `auto` of `new` that has a rule by the value in `old`, the stored recipe of the same run."""
    for key, field in fields(type(new)).items():
        before, now = vars(old).get(key), vars(new)[key]
        if isinstance(now, Section):
            if isinstance(before, Section) and (before.name, type(before).__name__) == (now.name, type(now).__name__):
                keep(before, now)
        elif now == AUTO and before is not None and field.metadata.get("auto"):
            setattr(new, key, before)
