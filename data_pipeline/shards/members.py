"""Which members of a tar belong to a sample, and under which extension each member is indexed.

As in webdataset, the name of a member consists of the key of its sample, up to the first dot, and an ending after it:
`0000007-oak.jpg` and `0000007-oak.cls` are members of the sample `0000007-oak`. Members whose endings are in
`INDEXED_EXTENSIONS` are always indexed. The argument `further` of the functions lists endings that are indexed too:
those of a part that reads them, or of `unlabeled shards index --members`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from common.errors import DataError
from data_pipeline.formats.image_formats import IMAGES

VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
AUDIO = ("flac", "wav", "opus", "ogg", "mp3")
INDEXED_EXTENSIONS = (
    *IMAGES,
    "npy",
    *VIDEOS,
    *AUDIO,
    "cls",
    "json",
    "txt",
    "docs",
    "tokens",
)  # always indexed, in this order
CONTENT_EXTENSIONS = tuple(e for e in INDEXED_EXTENSIONS if e not in ("cls", "json"))  # without annotations
MAX_MEMBER_BYTES = 256 << 20
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # key and ending, as webdataset splits them: at the first dot
VALID_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")

MAX_REASONS = 50  # reasons that are counted separately; all further ones are counted together
SEVERAL_DOTS = "several dots in the name, and other members beside it"
DOTS_ADVICE = (
    "as in webdataset, the name of a sample ends at the first dot, so these files belong to one sample; to make each of"
    " them a sample, unpack the tars and run `unlabeled shards build` on the folder"
)


def check_extensions(further: Iterable[str]) -> tuple[str, ...]:
    """The extensions of `further` that are not in INDEXED_EXTENSIONS, sorted. Raises DataError for an invalid one."""
    for extension in further:
        if not VALID_EXTENSION.fullmatch(extension):
            raise DataError(
                f"{extension!r} is not a valid extension of a member; write up to 32 lower-case letters, digits,"
                " dots, - and _, without the dot before the extension"
            )
    return tuple(sorted({*further} - {*INDEXED_EXTENSIONS}))


def in_order(extensions: Iterable[str]) -> list[str]:
    """The extensions in the order of an index's columns: first those of INDEXED_EXTENSIONS, then the others by name."""
    present = set(extensions)
    return [e for e in INDEXED_EXTENSIONS if e in present] + sorted(present - {*INDEXED_EXTENSIONS})


def member_extensions(endings: Iterable[str], further: Sequence[str] = ()) -> list[str]:
    """The extension under which each member of one sample is indexed; "" for a member that is left out.

    An ending with dots, such as `05.jpg`, is indexed as `jpg` if it is unambiguous. This requires that no member
    without dots in its ending is content, and that all endings with dots have the same beginning: `05.jpg` and `05.cls`
    are unambiguous, `input.jpg` and `target.jpg` are not.
    """
    endings, indexed = list(endings), {*INDEXED_EXTENSIONS, *further}
    beginnings = {e.rpartition(".")[0] for e in endings if e not in further and is_dotted(e, further)}
    unambiguous = len(beginnings) == 1 and not any(e in CONTENT_EXTENSIONS or e in further for e in endings)

    def extension(ending: str) -> str:
        if ending in indexed:
            return ending
        last = ending.rpartition(".")[2]
        return last if unambiguous and is_dotted(ending, further) and last not in endings else ""

    return [extension(ending) for ending in endings]


def is_indexed(ending: str, further: Sequence[str] = ()) -> bool:
    """Whether members with this ending are indexed. An ending with dots also has to be unambiguous, see
    `member_extensions`."""
    return ending in INDEXED_EXTENSIONS or ending in further or is_dotted(ending, further)


def is_dotted(ending: str, further: Sequence[str] = ()) -> bool:
    """Whether an ending has dots, and the part after the last dot is an extension that is indexed, as in `05.jpg`."""
    last = ending.rpartition(".")[2]
    return "." in ending and (last in INDEXED_EXTENSIONS or last in further)


class LeftOut(dict[str, list[Any]]):
    """Counts the members that are left out: {reason: [number of members, name of the first one]}."""

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Bytes of a name that are not UTF-8, which Python holds as unpaired surrogates, are counted and named as
        their escapes, because a manifest is valid UTF-8."""
        reason, name = (text.encode(errors="backslashreplace").decode() for text in (reason, name))
        reason = reason if reason in self or len(self) < MAX_REASONS else "other endings"
        self.setdefault(reason, [0, name])[0] += count

    def lines(self) -> list[str]:
        return [f"left out: {count} members, for example {name}: {reason}" for reason, (count, name) in self.items()]


def reason_not_indexed(ending: str) -> str:
    """The reason why a member whose ending is not indexed is left out."""
    return f".{ending[-20:]} is not an ending that is read" if ending else "its name has no key or no ending"


def no_samples_message(left_out: Iterable[dict[str, list[Any]]]) -> str:
    """The error message for shards without samples: which members are read, and which ones the shards hold."""
    others = [f"{count} members like {name} ({reason})" for part in left_out for reason, (count, name) in part.items()]
    left_out_text = f"; left out: {', '.join(others[:3])}" if others else ""
    return f"no samples; members are read whose names end in {', '.join(INDEXED_EXTENSIONS)}{left_out_text}"
