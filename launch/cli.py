"""The command line `unlabeled`. Its commands are in `commands.py`, `cluster_commands.py`,
`shard_commands.py` and `model_commands.py`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from common.errors import UserError, run_main
from launch import command_parser
from launch.commands import COMMANDS


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the command line `words`, or, if it is None, of all command lines."""
    description = "Pretrain foundation models on unlabeled data, from a laptop to a cluster."
    return command_parser.build_parser("unlabeled", description, COMMANDS, words)


def _refuse_dashes(words: list[str], unknown: list[str]) -> None:
    """Raise UserError for a key of a recipe that was written as an option: `--steps 5` or `--steps=5`."""
    from common import config
    from pretrain.recipes.recipe import Recipe

    for word in unknown:
        key, _, value = word.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if word.startswith("-") and key.partition(".")[0] in config.fields(Recipe):
            at = words.index(word) + 1
            value = value or (words[at] if at < len(words) and not words[at].startswith("-") else "VALUE")
            raise UserError(f"{word}: keys of a recipe are written without dashes; write {key}={value}")


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command line. Ends the process with a message if they are wrong."""
    full = parser(words)
    args, unparsed = full.parse_known_args()
    if hasattr(args, "overrides"):
        _refuse_dashes(words, unparsed)
    # argparse accepts no positional arguments after an option, although `overrides` and `protocols` may be repeated.
    # Therefore the words that it has not parsed are added to them here.
    repeated = next((name for name in ("overrides", "protocols") if hasattr(args, name)), "")
    can_be_added = all(not word.startswith("-") and ("=" in word or repeated != "overrides") for word in unparsed)
    if not repeated or not can_be_added:
        return full.parse_args()  # ends the process, and prints the unknown arguments
    getattr(args, repeated).extend(unparsed)
    return args


def main() -> int:
    def run() -> int | None:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
            from launch.completion import answer

            answer(parser())
        return command_parser.call(_parse(sys.argv[1:]))

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
