"""Open video and audio files with PyAV, the Python package of FFmpeg's libraries."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from common.errors import Damaged, DataError


def need_av() -> Any:
    """The package `av` (PyAV). Raises DataError that says how to install it."""
    try:
        import av
    except ImportError:
        raise DataError(
            "the package av, which reads videos and audio, is not installed; pip install 'unlabeled[video]' or 'unlabeled[audio]'"
        ) from None
    return av


def av_failure(error: Exception) -> str:
    """The text of one of PyAV's exceptions in one line, without its number."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__


@contextmanager
def open_av(source: bytes | IO[bytes]) -> Iterator[Any]:
    """A media file (av.container.InputContainer) in the given bytes, or in an open file. Raises `Damaged`, also for
    PyAV's errors in the context."""
    av = need_av()
    if source == b"":
        raise Damaged("is empty: 0 bytes")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        # FFmpeg may use no protocol, so that a file that is a playlist cannot make it open other files or URLs.
        with av.open(file, options={"protocol_whitelist": ""}, metadata_errors="replace") as media:
            yield media
    except (av.error.FFmpegError, ValueError) as error:
        raise Damaged(av_failure(error)) from None
