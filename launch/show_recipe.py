"""Print a resolved recipe as YAML, with the meaning of each key as a comment: `unlabeled recipes show NAME [key=value
…]`. `unlabeled train FILE` accepts the output."""

from __future__ import annotations

import json
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml

from common.config import Section, fields, to_dict
from common.explain import explanations
from common.yaml_values import leaves
from pretrain.objectives import finder
from pretrain.recipes.recipe import Recipe, names
from pretrain.run_folder.recipe_file import IMAGES_ONLY

WIDTH = 120  # columns
MAX_PRINTED_LIMIT = 1000  # higher upper limits are not printed, since they only guard against damaged files


def lines(recipe: Recipe, name: str) -> list[str]:
    """The lines of the YAML file. `name`: the name of the recipe that the user has given."""
    purpose = names().get(name)
    out = textwrap.wrap(f"# {name}: {purpose}", WIDTH, subsequent_indent="# ") if purpose else []
    out += ["# The resolved recipe, with the meaning of each key. Edit it, and train it with `unlabeled train FILE`"]
    out += [f"# {line}" for line in recipe.derived]
    hidden = set()
    if vars(recipe)["model"].reads == "tokens":
        hidden = {f"{section}.{key}" for section, keys in IMAGES_ONLY.items() for key in keys}
    return [*out, *_Writer(hidden).section(recipe, "", "")]


class _Writer:
    """Writes sections as YAML without the keys `hidden`. The options of a class are explained at its first section
    only."""

    def __init__(self, hidden: set[str]):
        self.hidden, self.explained = hidden, set[type]()

    def section(self, section: Section, key: str, indent: str) -> Iterator[str]:
        """The lines of a section, whose dotted key is `key`."""
        cls = type(section)
        known = {} if cls in self.explained else {name: meaning(section, name) for name in fields(cls)}
        self.explained.add(cls)
        stored = vars(section)
        if "name" in stored and "name" not in fields(cls):
            yield f"{indent}name: {_flow(stored['name'])}"
        for name in fields(cls):
            dotted = f"{key}.{name}".lstrip(".")
            if dotted not in self.hidden:
                yield from self._entry(stored[name], name, dotted, known.get(name, ""), indent)

    def _entry(self, value: Any, name: str, dotted: str, text: str, indent: str) -> Iterator[str]:
        if isinstance(value, list) and any(isinstance(item, Section) for item in value):
            yield from _commented(f"{indent}{name}:", text, indent)
            for item in value:
                first, *rest = self.section(item, dotted, f"{indent}    ")
                while first.lstrip().startswith("#"):
                    yield first
                    first, *rest = rest
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        elif isinstance(value, Section) and type(value) in self.explained:
            yield from _commented(f"{indent}{name}: {_flow(to_dict(value))}", text, indent)
        elif isinstance(value, Section):
            if not indent:
                yield ""
            yield from _commented(f"{indent}{name}:", text, indent)
            yield from self.section(value, dotted, f"{indent}  ")
        else:
            yield from _commented(f"{indent}{name}: {_flow(value)}", text, indent)


def meaning(section: Section, name: str) -> str:
    """The meaning of an option of a section: its comment, or the docstring of the sub-section that it holds, and the
    values that it can have."""
    cls, value = type(section), vars(section)[name]
    text = explanations(cls)[name]
    if isinstance(value, Section):
        docstring = "" if text and name not in ("model", "objective") else _docstring(value)
        return " ".join(filter(None, (text and f"{text}.", docstring))) if docstring else text
    return " ".join(filter(None, (text, _allowed(cls, name))))


def _docstring(section: Section) -> str:
    """The docstring of a section's class in one line; for the options of an objective, the first line of the
    objective's file."""
    if section.name in finder.names():
        return finder.purpose(section.name)
    text = type(section).__doc__ or ""
    is_generated = text.startswith(f"{type(section).__name__}(")  # by dataclasses, for a class without a docstring
    return "" if is_generated else " ".join(text.split())


def _allowed(cls: type[Section], name: str) -> str:
    """The limits or choices of an option, in brackets; "" if it has none."""
    hint = typing.get_type_hints(cls)[name]
    literals = [hint, *typing.get_args(hint)]
    choices = [str(v) for h in literals if typing.get_origin(h) is Literal for v in typing.get_args(h)]
    limits = fields(cls)[name].metadata.get("limits")
    is_printed = limits is not None and (limits.high is None or limits.high < MAX_PRINTED_LIMIT)
    parts = ([str(limits)] if is_printed else []) + choices
    return f"[{' | '.join(parts)}]" if parts else ""


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if any("\n" in str(text) for _, text in leaves(value)):
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 30, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _commented(line: str, text: str, indent: str) -> Iterator[str]:
    """A line with its comment: on the same line if both fit into WIDTH, otherwise above it."""
    if text and len(line) + len(text) + 4 <= WIDTH:
        yield f"{line}  # {text}"
        return
    if text:
        yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    yield line
