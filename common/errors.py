"""Errors that the user can correct.

Every command prints a `UserError` as one line without a traceback; any other exception is a bug of ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from common.output import OutputClosed, masked, say


class UserError(Exception):
    """One line that says what was wrong, the value seen, and what to write instead. Secrets in URLs are masked."""

    def __init__(self, *text: object):
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in text))

    printed_by_rank_0 = False  # true on the other ranks of a run, so that the line is printed once


class DataError(UserError):
    """Data is missing, or is not as expected."""


class Damaged(Exception):
    """A sample cannot be used; the text is the reason."""


class Absent(Damaged):
    """A sample lacks the member that is asked for. It is passed over and does not count as damaged."""


_OURS = Path(__file__).resolve().parents[1]
_PACKAGES = ("common", "data_pipeline", "pretrain", "eval", "launch")


def is_bug(error: BaseException) -> bool:
    """Whether an exception shows a mistake in the code of this project: of a kind that wrong code raises, and raised by
    a line of ours, not of a library.

    For code that takes any exception of a library for a failure of a store or for damage, since the library's exceptions
    have no common base.
    """
    if not isinstance(error, (TypeError, AttributeError, NameError, LookupError, AssertionError, ArithmeticError)):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    file = Path(place.tb_frame.f_code.co_filename) if place is not None else Path()
    return file.is_relative_to(_OURS) and file.relative_to(_OURS).parts[0] in _PACKAGES


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names that are most similar to `name`, for an error message: "did you mean a or b?" or "known: a, b,
    c".
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + (", ".join(known) if known else "none")


def command(main: Callable[[], int | None]) -> int:
    """Run a command's main function and return the exit code: 0 or its own; 2 for a `UserError`, which is printed; 130
    for Ctrl-C; 141 if its output is closed.
    """
    try:
        return main() or 0
    except UserError as error:
        if not error.printed_by_rank_0:
            say(f"error: {error}", file=sys.stderr)
        return 2
    except OutputClosed:
        return 141  # as a shell has it for SIGPIPE
    except KeyboardInterrupt:
        say("stopped by Ctrl-C", file=sys.stderr)
        return 130
