"""What every kind of source gives: files to look into, blocks to cut into shards, and entries, one per sample.

A source is looked into twice. The planner lists it and cuts it into blocks (bytes, rows, piece); a piece is JSON and says where the rows are.
A worker process then opens the source anew and turns each piece into entries, in order, as many as the block has rows.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, NamedTuple

from data_pipeline.index import MAX_MEMBER_BYTES
from data_pipeline.storage import DataError, is_local, open_store
from pretrain.errors import UserError

NAME_BYTES = 64  # of a key; with number and extension it stays below the 100 bytes that every tar reader knows


class File(NamedTuple):
    """A file of a source: its path below the source's root, "/" between the parts."""

    path: str
    size: int
    version: str  # time of change or etag

    @property
    def extension(self) -> str:
        return extension(self.path)


class Block(NamedTuple):
    """Consecutive rows that stay together: their bytes in a shard (about), how many, and where they are (JSON)."""

    bytes: int
    rows: int
    piece: list[Any]


class Entry(NamedTuple):
    """One row of a source: a sample's members by extension, or the reason why it cannot be used."""

    where: str  # the file or row, for the list of what was left out
    name: str = ""  # the readable part of the key
    members: dict[str, bytes] = {}
    reason: str = ""
    dropped: tuple[str, ...] = ()  # extensions of members that shards do not hold


@dataclass(frozen=True)
class Options:
    """What the user can say about a source; "" leaves it to what the source holds."""

    labels: str = ""  # a file of path and label
    image_field: str = ""
    text_field: str = ""
    label_field: str = ""
    lines: bool = False  # .txt: a document per line
    low: float = 0.0  # of the samples, those whose key hashes to [low, high): see split.py
    high: float = 1.0


class Tree:
    """The files below a URL, or the one file that it names."""

    def __init__(self, url: str):
        self.url = url.removeprefix("file://")
        self.local = is_local(url)
        if self.local:
            self.url = os.path.abspath(os.path.expanduser(self.url))
        self.fs, path = open_store(self.url)
        self.root, self.only = path.rstrip("/"), ""
        with reachable(self.url):
            if not self.fs.isdir(path):
                if not self.fs.isfile(path):
                    raise DataError(f"{url}: no such file or folder")
                self.root, _, self.only = path.rpartition("/")

    @cached_property
    def files(self) -> list[File]:
        """All files in order of their paths; hidden files and folders are not looked at."""
        if self.local:
            return [self._stat(self.only)] if self.only else sorted(self._walk())
        return [file for file in self._listed.values() if not self.only or file.path == self.only]

    @cached_property
    def _listed(self) -> dict[str, File]:
        """Everything below the root of a remote tree, by path."""
        out = {}
        with reachable(self.url):
            found = self.fs.find(self.place(self.only) if self.only else self.root, detail=True)
        for place, about in sorted(found.items()):
            path = place[len(self.root) :].lstrip("/")
            version = about.get("ETag") or about.get("etag") or about.get("LastModified") or about.get("created") or ""
            if about["type"] == "file" and not any(part.startswith(".") for part in path.split("/")):
                out[path] = File(path, int(about.get("size") or 0), str(version))
        return out

    def _walk(self) -> Iterator[File]:
        def fail(error: OSError) -> None:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

        for folder, folders, names in os.walk(self.root, onerror=fail, followlinks=True):
            here = os.path.realpath(folder) + os.sep
            folders[:] = [
                f for f in folders if not f.startswith(".") and not _leads_back(os.path.join(folder, f), here)
            ]
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for name in names:
                if not name.startswith("."):
                    yield self._stat(name if relative == "." else f"{relative}/{name}")

    def _stat(self, path: str) -> File:
        try:
            about = os.stat(self.place(path))
        except OSError:
            return File(path, 0, "missing")  # a dead link, say; named when it cannot be read
        return File(path, about.st_size, str(about.st_mtime_ns))

    def stat(self, path: str) -> File:
        """A file that a list names, which may lie outside of the tree; size 0 where it is not there."""
        if self.local:
            return self._stat(path)
        try:
            about = self.fs.info(self.place(path))
        except OSError:
            return File(path, 0, "missing")
        return File(path, int(about.get("size") or 0), str(about.get("ETag") or about.get("etag") or ""))

    def place(self, path: str) -> str:
        return os.path.join(self.root, path) if self.local else f"{self.root}/{path}"

    def open(self, path: str) -> IO[bytes]:
        return open(self.place(path), "rb") if self.local else self.fs.open(self.place(path), "rb")

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises OSError, of more than MAX_MEMBER_BYTES too."""
        size = os.path.getsize(self.place(path)) if self.local else 0
        if size > MAX_MEMBER_BYTES:
            raise OSError(f"{size} bytes, but {MAX_MEMBER_BYTES} are allowed")
        if not self.local:
            return self.fs.cat_file(self.place(path))
        with open(self.place(path), "rb") as file:
            return file.read()


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """What a remote store raises inside becomes a DataError: each has errors of its own, for a missing key as for a missing network."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise DataError(f"{url}: cannot be reached ({failure(error)})") from None
    except Exception as error:
        if is_local(url):
            raise
        raise DataError(f"{url}: cannot be reached ({type(error).__name__}: {failure(error)})") from None


def _leads_back(folder: str, here: str) -> bool:
    """Whether a link points to a folder that it lies in."""
    return os.path.islink(folder) and here.startswith(os.path.realpath(folder) + os.sep)


class Source:
    """One kind of source. `classes` are the label names once the planner knows them; `notes` what the user should read."""

    kind = ""
    title = ""
    reads: tuple[str, ...] = ()  # the options that it heeds
    overhead = 2048  # bytes of tar headers and padding per sample, about
    empty = "holds no rows"  # said of a source that gives nothing
    decodes = True  # images and videos are opened before they are written

    def __init__(self, tree: Tree, options: Options, limit: int, classes: list[str] | None = None):
        self.tree, self.options, self.limit = tree, options, limit
        self.classes: list[str] = classes or []
        self.notes: list[str] = []
        self.bad: list[tuple[str, str]] = []  # (path, reason) of what the planner found

    @classmethod
    def takes(cls, file: File) -> bool:
        """Whether a file belongs to this kind by its name."""
        raise NotImplementedError

    @cached_property
    def files(self) -> list[File]:
        return [file for file in self.tree.files if self.takes(file)]

    def read_too(self) -> list[File]:
        """Other files of the tree that may be read, because a list names them."""
        return []

    def others(self) -> list[File]:
        """The files of the tree beside its own."""
        mine = set(self.files)
        return [file for file in self.tree.files if file not in mine]

    def unread(self) -> list[File]:
        """The files that were not used, once all blocks are cut."""
        return self.others()

    def begin(self) -> None:
        """Check in the planner what can be known at once. Raises DataError."""

    def looked_into(self) -> list[str]:
        """The files that `survey` has to see before they can be cut."""
        return []

    def survey(self, path: str) -> dict[str, Any]:
        """{"blocks": [Block], "bad": [[path, reason]], "labels": [names]} of one file; JSON."""
        raise NotImplementedError

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        """The whole source in order."""
        for file in self.files:
            for block in surveys[file.path]["blocks"]:
                yield Block(*block)

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        """The rows of a piece in order; None for a row that holds nothing, as a blank line. Rows that cannot be used say so."""
        raise NotImplementedError

    def key(self, number: int, entry: Entry) -> str:
        """A key that is unique over the data set."""
        return f"{number:07d}-{safe_name(entry.name)}"


# ---------------------------------------------------------------- words
def extension(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def stem(path: str) -> str:
    """A file's name without folders and without its last extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def safe_name(text: str) -> str:
    """A name for a key: letters, digits, "_" and "-" of any script, at most NAME_BYTES bytes; never a path, never a dot."""
    clean = re.sub(r"[^\w-]+", "_", text).strip("_") or "sample"
    return clean.encode()[:NAME_BYTES].decode(errors="ignore")


def failure(error: Exception) -> str:
    """The reason of an exception, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def to_json(fields: dict[str, Any]) -> bytes:
    """Strict JSON; not-a-number becomes null, what JSON does not know (dates, decimals) its text."""
    return json.dumps(_plain(fields), default=str).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def text_member(text: Any) -> tuple[bytes, str]:
    """(UTF-8, why it cannot be used or "") of a field that should hold text."""
    if not isinstance(text, str):
        return b"", f"its text is {'missing' if text is None else type(text).__name__}"
    if not text.strip():
        return b"", "its text is empty"
    try:
        return text.encode(), ""
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        return b"", f"its text is no Unicode ({error.reason})"


def class_order(names: set[str]) -> list[str]:
    """Label names in order: numbers by value where all are numbers."""
    numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)
