"""Replaces every `auto` of a recipe by a value, by the rule of its option (`common.config.option`).

The stored recipe of a run has the values, and `keep` copies them when the run is resumed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from common.build_config import check_limits
from common.config import Facts, Section, fields
from common.schedules import Schedule
from pretrain.recipes.recipe import Recipe

AUTO = "auto"


def settle(
    cfg: Recipe,
    samples: int | None = None,
    recipe_of: Callable[[str], dict] | None = None,
    about_of: Callable[[str], dict] | None = None,
    classes: int = 0,
    pixels: str = "",
) -> list[str]:
    """Replace every `auto` that has a rule. Returns a line "key = value (auto: rule)" for each. Raises ConfigError for a
    value outside the limits of its option, such as a single class.

    `samples`: number of samples in the data; None: unknown, so that the number of samples that the run trains on is
    used. `recipe_of` reads the recipe of the run that `init.run` names, and `about_of` what the weights that
    `init.backbone` names state about themselves. `classes`: number of names of classes in the data; 0: unknown. `pixels`:
    the dtype that keeps all bits of the images; "": unknown.
    """
    stored = vars(cfg)
    steps, batch, start = stored["steps"], stored["data"].batch_size, vars(stored["init"])["run"]
    source = vars(stored["init"])["backbone"]
    known = Facts(
        steps,
        batch,
        samples or steps * batch,
        vars(stored["model"]),
        classes,
        pixels,
        backbone=lambda: about_of(source) if source and about_of is not None else {},
    )
    lines: list[str] = []

    @functools.cache
    def previous_recipe() -> dict[str, Any]:
        return recipe_of(start) if start and recipe_of is not None else {}

    def walk(section: Section, path: tuple[str, ...]) -> None:
        for key, field in fields(type(section)).items():
            value = vars(section)[key]
            if isinstance(value, Section):
                walk(value, (*path, key))
            elif value == AUTO:
                facts = dataclasses.replace(
                    known, key=key, section=vars(section), previous_run=lambda: _section_at(previous_recipe(), path)
                )
                for rule in field.metadata.get("auto", ()):
                    if (new := rule(facts)) is not None:
                        explanation = (rule.__doc__ or rule.__name__).splitlines()[0].rstrip(".")
                        name = ".".join((*path, key))
                        check_limits(new, {}, name, field, reason=f" (auto: {explanation})")
                        setattr(section, key, new)
                        lines.append(f"{name} = {_as_text(new)} (auto: {explanation})")
                        break

    walk(cfg, ())
    return lines


def _section_at(values: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """The section at a path in a recipe's plain values; {} if there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _as_text(value: Any) -> Any:
    """A value for a message; of a schedule, its first and its last value."""
    if not isinstance(value, Schedule):
        return value
    if value.kind != "constant":
        return f"{value.value:g} → {value.final:g}"
    return f"{value.start:g} → {value.value:g} over {value.warmup:g} steps" if value.warmup else f"{value.value:g}"


def keep(old: Section, new: Section) -> None:
    """Replace every `auto` of `new` that has a rule by the value in `old`, the stored recipe of the same run."""
    for key, field in fields(type(new)).items():
        old_value, new_value = vars(old).get(key), vars(new)[key]
        if isinstance(new_value, Section):
            if isinstance(old_value, Section) and _kind(old_value) == _kind(new_value):
                keep(old_value, new_value)
        elif new_value == AUTO and old_value is not None and field.metadata.get("auto"):
            setattr(new, key, old_value)


def _kind(section: Section) -> tuple[str, str]:
    return section.name, type(section).__name__
