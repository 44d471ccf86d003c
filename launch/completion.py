"""Tab completion for bash and zsh, by argcomplete: commands, options, names of recipes, and the keys of a recipe with
their values.

At each press of the tab key the shell starts `unlabeled`, with the command line in environment variables (COMP_LINE,
COMP_POINT). To answer fast, this module does not import torch.
"""

from __future__ import annotations

import argparse
import os
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

import argcomplete
from argcomplete.completers import FilesCompleter

from common.config import Section, fields
from common.errors import UserError
from launch.show_recipe import meaning
from pretrain.models.presets import PRESETS
from pretrain.objectives import finder
from pretrain.recipes.evaluation import Eval
from pretrain.recipes.recipe import CHOSEN, Recipe, load, names

DEFAULT_RECIPE = "demo"  # its keys are completed if the command line names no valid recipe
# keys whose values are completed as paths
PATHS = (
    "data.train",
    "run",
    "init.backbone",
    "init.text",
    "init.run",
    *(f"eval.{key}" for key in Eval().shard_lists()),
)


def script() -> str:
    """The shell code that turns completion on when bash or zsh evaluates it; it is the same for both."""
    return argcomplete.shell_integration.shellcode(["unlabeled"])


def answer(parser: argparse.ArgumentParser) -> None:
    """Print the completions of the command line for the shell, and end the process."""
    for action in _actions(parser):
        if action.dest == "recipe":
            action.completer = _recipes  # type: ignore[attr-defined]
        elif action.dest == "overrides":
            action.completer = _overrides  # type: ignore[attr-defined]
    _drop_options(parser)
    argcomplete.autocomplete(parser, always_complete_options=False)


def _drop_options(parser: argparse.ArgumentParser) -> None:
    """Remove options that take a value from the part of COMP_LINE before the cursor. argcomplete parses the line with
    argparse, which stops collecting the overrides `key=value …` at the first such option."""
    line = os.fsencode(os.environ["COMP_LINE"])[: int(os.environ["COMP_POINT"])].decode(errors="replace")
    flags = [flag for action in _actions(parser) if action.nargs is None for flag in action.option_strings]
    line = re.sub(rf" +(?:{'|'.join(map(re.escape, flags))})[ =]+[^ ]+(?= )", "", line)
    os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line.encode()))}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and, recursively, of its sub-commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)


def _recipes(prefix: str, **_: Any) -> dict[str, str]:
    """{name: purpose} of the recipes that begin with `prefix`, and YAML files and folders if it begins a path."""
    files = FilesCompleter(("yaml", "yml"))(prefix) if prefix else []
    return {name: purpose for name, purpose in names().items() if name.startswith(prefix)} | dict.fromkeys(files, "")


def _overrides(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> dict[str, str]:
    """{completion: explanation} of an override: `key=` with the meaning of the key, or, if `prefix` has a "=" already,
    `key=value` for each value that can be listed."""
    key, equals, value = prefix.partition("=")
    recipe = _recipe(parsed_args)
    if equals and key in PATHS:
        return {f"{key}={path}": "" for path in FilesCompleter()(value)}
    if equals:
        return {f"{key}={known}": "" for known in _values(recipe, key) if known.startswith(value)}
    return {f"{name}=": text for name, text in _keys(recipe, "") if name.startswith(prefix)}


def _recipe(parsed_args: argparse.Namespace) -> Recipe:
    """The recipe that the command line names, with the overrides that choose a model or an objective, because the keys
    of the recipe depend on this choice. If they are not valid, the recipe without them; if the recipe is not valid,
    DEFAULT_RECIPE."""
    chosen = [word for word in parsed_args.overrides or [] if word.partition("=")[0].partition(".")[0] in CHOSEN]
    for name, overrides in ((parsed_args.recipe, chosen), (parsed_args.recipe, []), (DEFAULT_RECIPE, [])):
        try:
            return load(name, overrides)
        except (UserError, TypeError):
            continue
    raise AssertionError


def _keys(section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted key, meaning) of all options of a section and of its sub-sections. A sub-section is a key itself if a
    single value can stand for it (`model=NAME`, or the section's `shorthand`)."""
    for name in fields(type(section)):
        value = vars(section)[name]
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            if key in CHOSEN or type(value).shorthand in fields(type(value)):
                yield key, meaning(section, name)
            yield from _keys(value, f"{key}.")
        else:
            yield key, meaning(section, name)


def _values(recipe: Recipe, key: str) -> list[str]:
    """The values of a key if they can be listed: names, the choices of a Literal, true and false, null. Otherwise
    []."""
    if key in CHOSEN:
        return [*PRESETS] if key == "model" else finder.names()
    section: Any = recipe
    *path, name = key.split(".")
    for part in path:
        section = vars(section).get(part) if isinstance(section, Section) else None
    if not isinstance(section, Section) or name not in fields(type(section)):
        return []
    value = vars(section)[name]
    if isinstance(value, Section):  # a single value stands for the option `shorthand` of the sub-section
        section, name = value, type(value).shorthand
    hint = typing.get_type_hints(type(section)).get(name)
    types = (hint, *typing.get_args(hint))  # the type hint and, of a union, its members
    values = [str(choice) for one in types if typing.get_origin(one) is Literal for choice in typing.get_args(one)]
    values += ["true", "false"] if bool in types else []
    return values + (["null"] if type(None) in types else [])
