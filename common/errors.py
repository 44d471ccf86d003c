"""Errors that the user can correct.

Every command prints a `UserError` as one line without a traceback; any other exception is a bug of ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from common.output import OutputClosed, mask_secrets, say


class UserError(Exception):
    """One line that says what was wrong, the value seen, and what to write instead. Secrets in URLs are masked."""

    def __init__(self, *text: object):
        super().__init__(*(mask_secrets(part) if isinstance(part, str) else part for part in text))

    printed_by_rank_0 = False  # true on the other ranks of a run, so that the line is printed once


class ConfigError(UserError):
    """A recipe or an override that cannot be used."""


class DataError(UserError):
    """Data is missing, or is not as expected."""


class Damaged(Exception):
    """A sample cannot be used; the text is the reason."""


class Absent(Damaged):
    """A sample lacks the requested member. It is skipped, and does not count as damaged."""


_REPOSITORY = Path(__file__).resolve().parents[1]
_PACKAGES = ("common", "data_pipeline", "pretrain", "eval", "launch")


def is_bug(error: BaseException) -> bool:
    """Whether an exception is a bug of this project: its type is one that wrong code raises, and a line of the project,
    not of a library, raised it.

    For code that has to treat any exception of a library as a failed store or as damaged data, because the library's
    exceptions have no common base class.
    """
    if not isinstance(error, (TypeError, AttributeError, NameError, LookupError, AssertionError, ArithmeticError)):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename) if frame is not None else Path()
    return file.is_relative_to(_REPOSITORY) and file.relative_to(_REPOSITORY).parts[0] in _PACKAGES


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names that are most similar to `name`, for an error message: "did you mean a or b?" or "known: a, b,
    c".
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + (", ".join(known) if known else "none")


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's main function. Returns the exit code: what `main` returns, or 0 for None; 2 for a `UserError`,
    which is printed; 130 for Ctrl-C; 141 if standard output is closed.
    """
    try:
        return main() or 0
    except UserError as error:
        if not error.printed_by_rank_0:
            say(f"error: {error}", file=sys.stderr)
        return 2
    except OutputClosed:
        return 141  # the exit code of a shell for SIGPIPE
    except KeyboardInterrupt:
        say("stopped by Ctrl-C", file=sys.stderr)
        return 130
