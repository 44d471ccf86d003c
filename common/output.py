"""Print text to the terminal and to log files. Printed text may contain names from data (files, members of tars,
captions, labels), so control characters in it are escaped, and secrets in URLs are masked.

`printable` does both, `say` prints lines, and `write` prints text that a model has generated. All modules of the
packages print with these functions.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

# Characters that are escaped: control characters (C0, DEL, C1), bidirectional formatting characters, line and paragraph
# separators, and unpaired surrogates, by which Python represents bytes of a file name that are not UTF-8.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
URL = re.compile(r"([A-Za-z][\w+.-]*)://[^\s'\"<>]+")
USER = re.compile(r"(?<=://)[^/\s]*@")  # user name and password of a URL
# A query parameter whose name suggests that its value is a secret. Group 1 is everything up to the "=".
PARAMETER = re.compile(
    r"([?&][^=&?#/]*(?:sig|token|secret|credential|pass|pwd|key|auth)[^=&?#/]*=)[^&#]+", re.IGNORECASE
)
# Schemes of URLs in which the text before "@" is a user name or a container, which is no secret unless ":PASSWORD"
# follows it.
SCHEMES_WITH_PUBLIC_USER = ("abfs", "abfss", "az", "wasb", "wasbs", "sftp", "ssh")


class OutputClosed(Exception):
    """The reader of standard output has closed it, as in `| head`. Later output is discarded."""


def printable(text: object, keep: str = "") -> str:
    """The text made safe to print: secrets in URLs are replaced by ***, and control characters are escaped, as in \\x1b
    or \\u202e.

    `keep`: control characters that are left as they are.
    """
    return UNSAFE.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], mask_secrets(str(text)))


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print each argument as one line, to standard output or to `file`."""
    stream = file or sys.stdout
    try:
        stream.write("".join(f"{printable(line)}\n" for line in lines))
        stream.flush()
    except BrokenPipeError:
        if file is not None:
            raise
        discard_stdout()
        raise OutputClosed from None


def write(text: str) -> None:
    """Print text without a newline at the end. Control characters other than newlines and tabs are escaped."""
    try:
        sys.stdout.write(printable(text, keep="\n\t"))
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        raise OutputClosed from None


def clear_screen() -> None:
    """Clear the terminal. Does nothing if standard output is not a terminal."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[2J\x1b[H")


def discard_stdout() -> None:
    """Redirect standard output to /dev/null, so that later writes to it raise no error."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)


def columns(rows: Sequence[Sequence[str]], min_widths: Sequence[int]) -> list[str]:
    """Format a table, given as rows of cells, as one line per row.

    `min_widths`: the minimum width of each column except the last one, which is not padded. A column becomes wider if
    its longest cell plus two spaces needs more.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(low, *(len(row[n]) + 2 for row in cells)) for n, low in enumerate(min_widths)] if cells else []
    return ["".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=False)) for row in cells]


# ---------------------------------------------------------------- secrets in URLs
def mask_secrets(text: str) -> str:
    """The text, with user names, passwords, tokens and signatures in its URLs replaced by ***."""
    return URL.sub(lambda match: _without(match[0], match[1], "***@", r"\1***"), text) if "://" in text else text


def drop_secrets(text: str) -> str:
    """The text, without the parts of its URLs that `mask_secrets` replaces by ***."""
    return URL.sub(lambda match: _without(match[0], match[1], "", ""), text) if "://" in text else text


def _without(url: str, scheme: str, user: str, parameter: str) -> str:
    """A URL with its user name and password replaced by `user`, and each secret query parameter by `parameter`, which
    is a template for `re.sub`."""

    def replacement(match: re.Match) -> str:
        return match[0] if ":" not in match[0] and scheme.lower() in SCHEMES_WITH_PUBLIC_USER else user

    return PARAMETER.sub(parameter, USER.sub(replacement, url))


def secrets_error(text: str) -> str:
    """The error message for a text with secrets in its URLs, which says where to give them instead; "" for a text
    without secrets."""
    if mask_secrets(text) == text:
        return ""
    if PARAMETER.search(text):
        return (
            "holds a signature or a key, which would be stored with the run or the shards and may expire before they"
            " are read again; write the store's own URL (s3://BUCKET/KEY, gs://…, az://…) and put the keys into the"
            " store's environment variables, or download the file first"
        )
    how = (
        "a line `machine HOST login USER password PASSWORD` in ~/.netrc"
        if "http" in text
        else "environment variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, …)"
    )
    return (
        "holds a user name or a password, which would be stored with the run or the shards;"
        f" write {drop_secrets(text)} and give them in {how}"
    )
