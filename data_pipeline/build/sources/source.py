"""The base class of all kinds of sources from which `unlabeled shards build` makes shards.

A source consists of rows, each of which becomes one sample. It is read twice. First, the planning process lists its
files and divides its rows into blocks (bytes, rows, piece), from which it plans the shards. The piece is a JSON value
that states where in the source the rows are. Then a worker process opens the source again and converts each piece into
entries, one for each row of the block, in order. Files whose rows can only be found by reading them are surveyed by
worker processes before the blocks are made.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from common.errors import DataError
from data_pipeline.build.sources.source_files import File, Tree
from data_pipeline.formats.image_formats import JPEG, MAX_PIXELS, MAX_PIXELS_LIMIT

# Longest name within a key. With the sample's number and an extension, the name of a member stays below 100 bytes,
# which every tar reader supports.
MAX_NAME_BYTES = 64


class Block(NamedTuple):
    """Consecutive rows that are always written to the same shard."""

    bytes: int  # approximate size of the rows in a shard
    rows: int  # number of rows
    piece: list[Any]  # where the rows are in the source, as a JSON value


class Entry(NamedTuple):
    """One row of a source: the members of a sample, or the reason why the row cannot be used."""

    where: str  # the file or row, for the list of samples that are left out
    name: str = ""  # the readable part of the key
    members: dict[str, bytes] = {}  # by extension
    reason: str = ""  # why the row cannot be used; "" if it can
    dropped: tuple[str, ...] = ()  # extensions of the files that are not written, because shards cannot hold them


@dataclass(frozen=True)
class Options:
    """The user's options for a source. "" means that the source chooses the value."""

    labels: str = ""  # a file that states the label of each path
    image_field: str = ""
    text_field: str = ""
    label_field: str = ""
    lines: bool = False  # .txt: each line is a document
    bits: int = 16  # bits that the values of 16-bit images use: 0 to 2^bits - 1 stand for 0 to 1
    as_stored: bool = False  # do not apply an EXIF orientation
    separator: str = ""  # .txt: the text between two documents of a file
    frames_every: float | None = None  # interval in seconds between the frames of a video that become images
    fps: float | None = None  # frames per second of videos that are folders of frames
    tile: int | None = None  # side in pixels of the tiles into which images are cut
    tile_level: int = 0  # level of the pyramid of a slide from which tiles are cut; 0 is the largest one
    tile_min_std: float = 0.0  # standard deviation below which a tile is left out
    tile_jpeg: int | None = None  # quality of the JPEGs that 8-bit tiles become; None: PNG
    window: str = ""  # "LOW,HIGH": numbers of medical images that become the lowest and the highest level of grey
    dicom_fields: str = ""  # keywords of DICOM, separated by commas, whose values are written to the .json members
    seconds: float | None = None  # audio: longest recording; longer ones are cut into pieces
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


class Source:
    """The base class of one kind of source.

    `limit`: the approximate number of bytes of a shard, which is also the limit for a block; `classes`: the names of
    the labels, as soon as the planning process knows them; `notes`: remarks that are printed for the user.
    """

    kind = ""  # the name of the kind, as in `--kind`
    title = ""  # the kind in words, for messages
    reads: tuple[str, ...] = ()  # names of the options that this kind uses
    overhead = 2048  # approximate bytes of tar headers and padding per sample
    empty = "holds no rows"  # error message for a source without rows
    decodes = True  # whether images and videos are decoded before they are written
    kind_given = False  # whether the user has given the kind, so that it was not detected

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
        of_kind = set(self.files)
        return [file for file in self.tree.files if file not in of_kind]

    def unread(self) -> list[File]:
        """The files that no block uses. Call it after `blocks` has yielded all blocks."""
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
def member_of(ending: str) -> str:
    """The extension under which shards store a file with the extension `ending`: the rare extensions of JPEGs become
    jpg."""
    return JPEG[0] if ending in ("jfif", "jpe") else ending


def stem(path: str) -> str:
    """The name of a file without folders and without its last extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def safe_name(text: str) -> str:
    """Convert a text to a part of a key: letters and digits of any script, "_" and "-", at most MAX_NAME_BYTES bytes.

    All other characters, including "/" and dots, become "_".
    """
    clean = re.sub(r"[^\w-]+", "_", text).strip("_") or "sample"
    return clean.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


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
    """The content of a .txt member, from the value of a field, which is text if it is a str, or bytes of UTF-8.

    Returns (bytes, ""), or (b"", the reason why it is not usable text).
    """
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
        commands = " and ".join(f"`unlabeled shards build {tree.full_path(name)} DST/{name}`" for name in found)
        raise DataError(
            f"{tree.url}: its sub-folders are {', '.join(found)}: parts of a data set, not labels; build each:"
            f" {commands}; to train on several of them, write a list of folders in data.train"
        )


def class_order(names: set[str]) -> list[str]:
    """Sort the names of labels, by value if all of them are whole numbers."""
    numbers = all(re.fullmatch(r"-?\d{1,18}", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)
