"""Builds the command line's parser from typed functions: the arguments of a command follow from the signature of its
function.

    def shards_stats(url: Shards, *, sheet: Annotated[HomePath, "FILE.png", "draw samples into this file"] = ""):
        "Count the members of shards."

`url` becomes a positional argument, and `sheet` the option `--sheet FILE.png`. The docstring becomes the help of the
command. `Annotated[type, "help"]` or `Annotated[type, "METAVAR", "help"]` gives the help of an argument. A default
makes an argument optional, a bool is a switch, and a Sequence takes several words.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NewType, NoReturn, get_args, get_origin

from common.output import printable
from common.yaml_values import expand_home

HomePath = NewType("HomePath", str)  # a local path; "~" at its beginning is expanded if the shell has not done it
Command = Callable[..., int | None]
Commands = Mapping[str, "Command | tuple[str, Commands]"]  # a command, or (help, the commands of a group)


def build_parser(
    name: str, description: str, commands: Commands, words: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """A parser whose result has the function of the command as `main`, and the arguments of the function by name.

    `words`: the command line that it will parse. To start fast, commands whose names do not occur in it are built
    without arguments. None: all commands are built with arguments.
    """
    parser = _Parser(name, description=description)
    _add_commands(parser.add_subparsers(required=True, metavar="COMMAND"), commands, words)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that escapes control characters in its error messages: words of a command line may be names of files,
    which a shell has put in the place of `*`."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def call(parsed: argparse.Namespace) -> int | None:
    """Run the command that a parser from `build_parser` has parsed. Returns the exit status."""
    values = dict(vars(parsed))
    return values.pop("main")(**values)


def _add_commands(subparsers: Any, commands: Commands, words: Sequence[str] | None) -> None:
    for name, entry in commands.items():
        wanted = words is None or name in words
        if not isinstance(entry, tuple):
            _add_command(subparsers, name, entry, wanted)
            continue
        text, group = entry
        default = group.get("")  # the command that runs if only the name of the group is given
        if callable(default):
            parser = _add_command(subparsers, name, default, wanted)
        else:
            parser = subparsers.add_parser(name, help=text, description=text)
        if wanted:
            inner = parser.add_subparsers(required=default is None, metavar="COMMAND")
            _add_commands(inner, {key: command for key, command in group.items() if key}, words)


def _add_command(subparsers: Any, name: str, function: Command, wanted: bool) -> argparse.ArgumentParser:
    text = " ".join((function.__doc__ or "").split())
    parser = subparsers.add_parser(name, help=text, description=text)
    parser.set_defaults(main=function)
    if wanted:
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            _add_argument(parser, parameter)
    return parser


def _add_argument(parser: argparse.ArgumentParser, parameter: inspect.Parameter) -> None:
    kind, metavar, text = _read_annotation(parameter.annotation)
    default = parameter.default
    options: dict[str, Any] = {"help": text}
    if metavar:
        options["metavar"] = metavar
    if default is not inspect.Parameter.empty:
        options["default"] = default
        if "default" not in text and default not in ("", None, False, ()):
            options["help"] += f" (default {default:g})" if isinstance(default, float) else f" (default {default})"
    if kind is bool:
        options["action"] = "store_true"
    elif get_origin(kind) is Sequence:
        options |= {"type": _converter(get_args(kind)[0]), "nargs": "+"}
        if "default" in options:
            options["default"] = list(default)
    else:
        options["type"] = _converter(kind)
    if choices := get_args(kind) if isinstance(next(iter(get_args(kind)), None), str) else ():  # a Literal
        options |= {"type": str, "choices": choices}
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        parser.add_argument(f"--{parameter.name.replace('_', '-')}", required="default" not in options, **options)
    else:
        if "default" in options:
            options["nargs"] = "*" if options.get("nargs") else "?"
        parser.add_argument(parameter.name, **options)


def _read_annotation(annotation: Any) -> tuple[Any, str, str]:
    """(type, metavar or "", help) of a parameter. For `T | None` the type is T."""
    if get_origin(annotation) is not Annotated:
        return annotation, "", ""
    kind, *notes = get_args(annotation)
    if type(None) in get_args(kind):
        kind = next(member for member in get_args(kind) if member is not type(None))
    return kind, notes[0] if len(notes) > 1 else "", notes[-1]


def _converter(kind: Any) -> Callable[[str], Any]:
    """The function that makes a value of the type `kind` from a word of the command line."""
    return expand_home if kind is HomePath else kind
