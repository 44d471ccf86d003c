"""Errors that the user can mend. `UserError` is printed as one line, without a traceback, by every command; anything else is a bug of ours."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """What was wrong, the value seen, and what to write instead, in one line."""

    said = False  # by another process of the same run, so that one line is printed and not one for each


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names that look most like `name`, for an error message: "did you mean a, b?" or "known: a, b, c"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + (", ".join(known) if known else "none")


def command(main: Callable[[], int | None]) -> int:
    """Run a command's main function: 0 or its own code; 2 and one line for a `UserError`; 130 for Ctrl-C."""
    try:
        return main() or 0
    except UserError as error:
        if not error.said:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
