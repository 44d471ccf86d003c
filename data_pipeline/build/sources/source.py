"""The base class of all kinds of sources from which `unlabeled shards build` makes shards, and the files of a source.

A source consists of rows, each of which becomes one sample. It is read twice. First, the planning process lists its
files and divides its rows into blocks (bytes, rows, piece), from which it plans the shards; the piece is a JSON value
that states where the rows are. Then a worker process opens the source again and converts each piece into entries, one
for each row of the block, in order. Files whose rows can only be found by reading them are surveyed by worker processes
before the blocks are made.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import DataError, UserError, is_bug
from common.untrusted import open_binary, read_binary
from data_pipeline.formats.image_formats import JPEG, MAX_PIXELS, MAX_PIXELS_LIMIT
from data_pipeline.shards.members import MAX_MEMBER_BYTES
from data_pipeline.storage.urls import is_local, open_store

# Longest name within a key. With the sample's number and an extension, the name of a member stays below 100 bytes,
# which every tar reader supports.
MAX_NAME_BYTES = 64


class File(NamedTuple):
    """A file of a source, with its path below the root of the source, separated by "/"."""

    path: str
    size: int
    version: str  # modification time or etag

    @property
    def extension(self) -> str:
        return extension(self.path)


class Block(NamedTuple):
    """Consecutive rows that are always written to the same shard."""

    bytes: int  # approximate size of the rows in a shard
    rows: int  # number of rows
    piece: list[Any]  # where the rows are in the source, as a JSON value


class Entry(NamedTuple):
    """One row of a source: the members of a sample by extension, or the reason why it cannot be used."""

    where: str  # the file or row, for the list of samples that are left out
    name: str = ""  # the readable part of the key
    members: dict[str, bytes] = {}
    reason: str = ""  # why the row cannot be used; "" if it can
    dropped: tuple[
        str, ...
    ] = ()  # extensions of files of this sample that shards cannot hold, and that are not written


@dataclass(frozen=True)
class Options:
    """The user's options for a source; "" means that the source decides."""

    labels: str = ""  # a file that states the label of each path
    image_field: str = ""
    text_field: str = ""
    label_field: str = ""
    lines: bool = False  # .txt: a document per line
    bits: int = 16  # bits that the values of 16-bit images use: 0 to 2^bits - 1 are scaled to 0 to 255
    as_stored: bool = False  # do not apply an EXIF orientation
    separator: str = ""  # .txt: the text between two documents of a file
    frames_every: float | None = None  # interval in seconds between the frames of a video that become images
    # Only samples whose key has a hash in [low, high), as a fraction of all hashes, are used: see split.py.
    low: float = 0.0
    high: float = 1.0
    max_pixels: int = MAX_PIXELS  # images with more pixels are left out
    # Extensions that the index of the source has in addition to INDEXED_EXTENSIONS. The user cannot set this.
    further: list[str] = field(default_factory=list)

    @property
    def pixels(self) -> dict[str, Any]:
        """The options for decoding images that differ from their defaults, as the manifest stores them."""
        return {name: getattr(self, name) for name in DECODE_OPTIONS if getattr(self, name) != getattr(Options, name)}


DECODE_OPTIONS = ("bits", "as_stored")  # options for decoding images that the manifest of the shards stores
# The manifest does not store `max_pixels`, because each reader of the shards sets its own limit.
IMAGE_OPTIONS = (*DECODE_OPTIONS, "max_pixels")


def check_bits(bits: int) -> None:
    """Raise DataError if `bits` is not a number of bits that the values of 16-bit images can use."""
    if not 8 <= bits <= 16:
        raise DataError(f"--bits {bits}: write 8 to 16, the number of bits that the values of 16-bit images use")


def check_max_pixels(count: int) -> None:
    """Raise DataError if the limit of pixels per image is not within 1 to MAX_PIXELS_LIMIT."""
    if not 1 <= count <= MAX_PIXELS_LIMIT:
        raise DataError(f"--max-pixels {count}: write 1 to {MAX_PIXELS_LIMIT}, the most pixels that an image may have")


class Tree:
    """The files in the folder that a URL or a path names, or the single file that it names. Hidden files are skipped.

    Methods take paths relative to `root`, the folder. `single_file` is "" for a folder.
    """

    def __init__(self, url: str):
        self.url = url.removeprefix("file://")
        self.local = is_local(url)
        if self.local:
            self.url = os.path.abspath(os.path.expanduser(self.url))
        self.fs, path = open_store(self.url)
        self.root, self.single_file = path.rstrip("/"), ""
        with as_data_error(self.url):
            if not self.fs.isdir(path):
                if not self.fs.isfile(path):
                    raise DataError(f"{url}: no such file or folder")
                self.root, _, self.single_file = path.rpartition("/")

    @cached_property
    def files(self) -> list[File]:
        """All files, sorted by path, without hidden files and the content of hidden folders."""
        if self.local:
            return [self._stat(self.single_file)] if self.single_file else sorted(self._walk())
        return [file for file in self._listed.values() if not self.single_file or file.path == self.single_file]

    @cached_property
    def _listed(self) -> dict[str, File]:
        """{path: file} of all files of a remote tree."""
        out = {}
        with as_data_error(self.url):
            found = self.fs.find(self.place(self.single_file) if self.single_file else self.root, detail=True)
        for place, info in sorted(found.items()):
            path = place[len(self.root) :].lstrip("/")
            version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("created") or ""
            if info["type"] == "file" and not any(part.startswith(".") for part in path.split("/")):
                out[path] = File(path, int(info.get("size") or 0), str(version))
        return out

    def _walk(self) -> Iterator[File]:
        """Yield the files of a local folder. Links to folders are followed, except those that lead to a folder that
        contains them, which would never end.
        """

        def fail(error: OSError) -> None:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

        # Folders still to be visited, each with the identities of the folders that contain it. The parents of a link
        # and of its target both count.
        containing = {self.root: frozenset[tuple[int, int]]()}
        for folder, folders, names in os.walk(self.root, onerror=fail, followlinks=True):
            links = [folder] if folder == self.root or os.path.islink(folder) else []
            parents = {_identity(parent) for link in links for parent in _parents(link)}
            ancestors = containing.pop(folder) | {_identity(folder)} | parents
            folders[:] = [
                f for f in folders if not f.startswith(".") and not _leads_back(os.path.join(folder, f), ancestors)
            ]
            containing |= {os.path.join(folder, f): ancestors for f in folders}
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for name in names:
                if not name.startswith("."):
                    yield self._stat(name if relative == "." else f"{relative}/{name}")

    def _stat(self, path: str) -> File:
        try:
            info = os.stat(self.place(path))
        except OSError:
            return File(path, 0, "missing")  # for example a broken link; reading the file raises the error
        return File(path, info.st_size, str(info.st_mtime_ns))

    def stat(self, path: str) -> File:
        """The size and the version of a file, which may be outside the tree if a list names it; size 0 if it is
        missing.
        """
        if self.local:
            return self._stat(path)
        try:
            info = self.fs.info(self.place(path))
        except OSError:
            return File(path, 0, "missing")
        return File(path, int(info.get("size") or 0), str(info.get("ETag") or info.get("etag") or ""))

    def place(self, path: str) -> str:
        """The absolute path of a file, or its path in the remote store."""
        return os.path.join(self.root, path) if self.local else f"{self.root}/{path}"

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading, and decompress it if its name says that it is compressed. Raises OSError, also for a
        FIFO or a device.
        """
        return decompressed(path, open_binary(self.place(path)) if self.local else self.fs.open(self.place(path), "rb"))

    def read(self, path: str) -> bytes:
        """The bytes of a file, decompressed. Raises OSError, also if they are more than MAX_MEMBER_BYTES."""
        if (size := self.stat(path).size) > MAX_MEMBER_BYTES:
            raise OSError(f"holds {size} bytes, but at most {MAX_MEMBER_BYTES} are allowed")
        if is_compressed(path):
            with self.open(path) as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
            if len(data) > MAX_MEMBER_BYTES:
                raise OSError(f"holds more than {MAX_MEMBER_BYTES} bytes when it is decompressed; no more are allowed")
            return data
        if not self.local:
            return self.fs.cat_file(self.place(path))
        return read_binary(self.place(path), MAX_MEMBER_BYTES)


@contextmanager
def as_data_error(url: str) -> Iterator[None]:
    """Convert the exceptions of a store to DataError. Each store raises exceptions of its own for missing credentials,
    an unreachable network and so on; they have no common base class.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise DataError(f"{url}: cannot be reached ({reason_of(error)})") from None
    except Exception as error:
        if is_local(url) or is_bug(error):
            raise
        raise DataError(f"{url}: cannot be reached ({type(error).__name__}: {reason_of(error)})") from None


def _identity(folder: str | Path) -> tuple[int, int]:
    """The device and inode numbers of a folder. They do not depend on the links by which it was reached."""
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def _parents(folder: str) -> Sequence[Path]:
    return Path(os.path.realpath(folder)).parents


def _leads_back(folder: str, ancestors: frozenset[tuple[int, int]]) -> bool:
    """Whether `folder` is a link to one of `ancestors`, the folders that contain it."""
    try:
        return os.path.islink(folder) and _identity(folder) in ancestors
    except OSError:
        return True  # the folder has been deleted in the meantime; skip it


READ_ERRORS = (OSError, EOFError, zlib.error)  # exceptions that reading or decompressing a file may raise


class Source:
    """The base class of one kind of source.

    `limit`: the approximate number of bytes of a shard, and so the most of a block; `classes`: the names of the labels,
    once the planning process knows them; `notes`: remarks that are printed for the user.
    """

    kind = ""  # the name of the kind, as in `--kind`
    title = ""  # the kind in words, for messages
    reads: tuple[str, ...] = ()  # names of the options that this kind uses
    overhead = 2048  # approximate bytes of tar headers and padding per sample
    empty = "holds no rows"  # error message for a source without rows
    decodes = True  # whether images and videos are decoded before they are written
    named = False  # whether the user has named the kind, instead of having it detected

    def __init__(self, tree: Tree, options: Options, limit: int, classes: list[str] | None = None):
        self.tree, self.options, self.limit = tree, options, limit
        self.classes: list[str] = classes or []
        self.notes: list[str] = []
        self.bad: list[tuple[str, str]] = []  # (path, reason) of the files that the planning process leaves out

    @classmethod
    def takes(cls, file: File) -> bool:
        """Whether a file belongs to this kind, judged by its name."""
        raise NotImplementedError

    @cached_property
    def files(self) -> list[File]:
        return [file for file in self.tree.files if self.takes(file)]

    def extra_files(self) -> list[File]:
        """Files that do not belong to this kind by their names, but may be read because a list names them."""
        return []

    def other_files(self) -> list[File]:
        """The files of the tree that do not belong to this kind."""
        mine = set(self.files)
        return [file for file in self.tree.files if file not in mine]

    def unread(self) -> list[File]:
        """The files that no block uses. Valid after `blocks` has yielded all blocks."""
        return self.other_files()

    def begin(self) -> None:
        """Check the source in the planning process before any file is surveyed. Raises DataError."""

    def files_to_survey(self) -> list[str]:
        """The paths of the files that have to be surveyed before they can be divided into blocks."""
        return []

    def survey(self, path: str) -> dict[str, Any]:
        """Survey one file in a worker process.

        Returns a JSON value {"blocks": [Block], "bad": [[path, reason]], "labels": [names]}; "labels" is optional.
        """
        raise NotImplementedError

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        """Yield the blocks of the whole source, in order. `surveys`: {path: the result of `survey`}."""
        for file in self.files:
            for block in surveys[file.path]["blocks"]:
                yield Block(*block)

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        """Yield the rows of a piece, in order; None for an empty row, such as a blank line.

        A row that cannot be used is an entry with a reason.
        """
        raise NotImplementedError

    def key(self, number: int, entry: Entry) -> str:
        """The key of row `number` of the source, unique within the data set."""
        return f"{number:07d}-{safe_name(entry.name)}"


# ---------------------------------------------------------------- names and texts
COMPRESSIBLE = ("jsonl", "json", "csv", "tsv", "txt")  # extensions that may be followed by .gz or .zst


def extension(path: str) -> str:
    """The extension of a file name in lower case, without .gz or .zst after a compressible one: "jsonl" for
    `x.jsonl.gz`.
    """
    name = path.rpartition("/")[2].lower()
    inner = name.rpartition(".")[0].rpartition(".")[2] if name.endswith((".gz", ".zst")) else ""
    return inner if inner in COMPRESSIBLE else name.rpartition(".")[2] if "." in name else ""


def is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".zst")) and extension(path) in COMPRESSIBLE


def decompressed(path: str, raw: Any) -> Any:
    """A file object for the decompressed content of `raw` if `path` is a compressed file, otherwise `raw` itself."""
    if not is_compressed(path):
        return raw
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: pyarrow, which decompresses .zst files, is not installed; run pip install 'unlabeled[parquet]'"
        ) from None
    return io.BufferedReader(_Forward(pyarrow.CompressedInputStream(raw, "zstd")))  # type: ignore[arg-type]


class _Forward(io.RawIOBase):
    """A file over a stream that cannot seek: it seeks forward by reading, and raises OSError for seeking backward."""

    def __init__(self, stream: Any):
        self.stream, self.place = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> int:
        if whence == 1:
            place += self.place
        if whence == 2 or place < self.place:
            raise OSError("a compressed file can only be read forward; decompress it first")
        while self.place < place and self.read(min(1 << 20, place - self.place)):
            pass
        return self.place

    def readinto(self, target: Any) -> int:
        data = self.stream.read(len(target))
        target[: len(data)] = data
        self.place += len(data)
        return len(data)


def member_of(ending: str) -> str:
    """The extension under which a file with the extension `ending` is stored in a shard: rare ones of JPEGs become jpg."""
    return JPEG[0] if ending in ("jfif", "jpe") else ending


def stem(path: str) -> str:
    """The name of a file without folders and without its last extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def safe_name(text: str) -> str:
    """A text converted to a part of a key: letters and digits of any script, "_" and "-", at most MAX_NAME_BYTES bytes.

    All other characters, also "/" and dots, become "_".
    """
    clean = re.sub(r"[^\w-]+", "_", text).strip("_") or "sample"
    return clean.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def reason_of(error: Exception) -> str:
    """The text of an exception in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def to_json(fields: dict[str, Any]) -> bytes:
    """Encode fields as strict JSON: NaN and infinity become null, values of other types (dates, decimals) become text,
    and bytes are left out.
    """
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
    """(UTF-8 bytes, "") of a field that holds text, as str or as bytes; (b"", the reason) if it cannot be used as text."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return b"", f"its text is not UTF-8 ({error.reason} at byte {error.start})"
    if not isinstance(text, str):
        return b"", f"its text is {'missing' if text is None else type(text).__name__}"
    if not text.strip():
        return b"", "its text is empty"
    try:
        return text.encode(), ""
    except UnicodeEncodeError as error:  # an unpaired surrogate, which JSON can express
        return b"", f"its text holds a character that is not valid Unicode ({error.reason})"


# A folder name that names a split of a data set, such as "train", "val2" or "test-set".
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|eval|test|testing)([-_]?(set|\d+))?", re.IGNORECASE)


def refuse_splits(labels: Iterable[str], tree: Tree) -> None:
    """Raise DataError if all folders that would become labels have names of splits (train, val, …)."""
    found = sorted(set(labels))
    if found and all(SPLIT.fullmatch(name) for name in found):
        todo = " and ".join(f"`unlabeled shards build {tree.place(name)} DST/{name}`" for name in found)
        raise DataError(
            f"{tree.url}: its sub-folders are {', '.join(found)}: parts of a data set, not labels; build each: {todo};"
            " to train on several of them, write a list of folders in data.train"
        )


def class_order(names: set[str]) -> list[str]:
    """Sort the names of labels, by value if all of them are whole numbers."""
    numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)
