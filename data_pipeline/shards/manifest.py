"""The manifest of a shard set, `manifest.json`: its shards with their sizes, numbers of samples and hashes, the
extensions of their members, the names of the classes, and where the set came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from common.errors import DataError
from common.untrusted import loads, schema_error, short_repr
from data_pipeline.shards.members import VALID_EXTENSION, LeftOut
from data_pipeline.storage.ranges import MissingFile, with_retries
from data_pipeline.storage.urls import open_store

FORMAT = 1
MANIFEST = "manifest.json"
# Keys that `render_manifest` writes itself, and that are not part of `Manifest.details`.
MANIFEST_KEYS = ("columns", "samples", "bytes", "dataset", "index", "index_hash")


@dataclass
class Manifest:
    """A set of S shards. `names` are their names in `folder`, or their full URLs if `folder` is empty."""

    folder: str
    names: list[str]
    sizes: np.ndarray  # int64 [S], bytes
    counts: np.ndarray  # int64 [S], samples
    hashes: list[str]  # xxh3-128 of each shard
    extensions: list[str]  # of the members, in the order of the columns of the index
    details: dict[str, Any]  # the other keys of the file: classes, source, …
    index: str  # URL of the index file
    index_hash: str  # xxh3-128 of the index file
    id: str  # see `dataset_id`

    @classmethod
    def of_shards(
        cls,
        shards: Sequence[Sequence[Any]],
        extensions: list[str],
        details: dict[str, Any],
        *,
        folder: str = "",
        index: str = "",
        index_hash: str = "",
        id: str,
    ) -> Manifest:
        """The manifest of shards that are given as rows (name, bytes, samples, hash)."""
        names, sizes, counts, hashes = (list(column) for column in zip(*shards, strict=True)) if shards else ([],) * 4
        arrays = np.array(sizes, np.int64), np.array(counts, np.int64)
        return cls(folder, names, *arrays, hashes, extensions, details, index, index_hash, id)

    @property
    def shards(self) -> list[tuple[str, int, int, str]]:
        """(name, bytes, samples, hash) of each shard."""
        return list(zip(self.names, self.sizes.tolist(), self.counts.tolist(), self.hashes, strict=True))

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def total_bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def classes(self) -> list[str]:
        return self.details.get("classes", [])

    @property
    def left_out(self) -> LeftOut:
        """The members that are not part of any sample, counted by reason."""
        return LeftOut(self.details.get("left_out", {}))

    @property
    def pixels(self) -> dict[str, Any]:
        """Options of `Encoded` with which the images of the set are decoded, if they differ from the defaults."""
        return {name: self.details[name] for name in ("bits", "as_stored") if name in self.details}

    def url(self, shard: int) -> str:
        return f"{self.folder}/{self.names[shard]}" if self.folder else self.names[shard]

    def first_difference(self, other: Manifest) -> str:
        """The first difference between this manifest and a later one, as text; "" if they list the same shards."""
        before, now = ({name: entry for name, *entry in manifest.shards} for manifest in (self, other))
        counts = f"({len(before)} shards before, {len(now)} now)"
        for name, entry in before.items():
            if name not in now:
                return f"{name} does not exist any more {counts}"
            if now[name] != entry:
                old, new = (f"{samples} samples in {size} bytes" for size, samples, _ in (entry, now[name]))
                return f"{name} had {old}, now {new}" if old != new else f"the bytes of {name} have changed"
        for name in now:
            if name not in before:
                return f"{name} is new {counts}"
        return "" if self.names == other.names else "the shards are in another order"


def common_classes(lists: Sequence[list[str]]) -> list[str]:
    """The names of classes that hold for the labels of several manifests: the longest list, if every list has names and
    is its beginning; otherwise []."""
    longest = max(lists, key=len, default=[])
    return longest if all(names and names == longest[: len(names)] for names in lists) else []


def dataset_id(names: Iterable[str], sizes: Iterable[int], counts: Iterable[int], hashes: Iterable[str]) -> str:
    """A hash of every byte of a shard set and of the order of its samples. It does not depend on the folder."""
    out = xxhash.xxh3_128()
    for name, size, count, digest in zip(names, sizes, counts, hashes, strict=True):
        out.update(f"{name.rpartition('/')[2]}\0{size}\0{count}\0{digest}\n".encode())
    return out.hexdigest()


_TOKENS_SCHEMA = {
    "format": int,
    "dtype": str,
    "block": int,
    "vocabulary": int,
    "tokenizer": str,
    "pad": int,
    "shards": {...: int},
    "documents": int,
    "tokens": int,
    "bytes": int,
}
_SCHEMA = {  # of the JSON file, see `schema_error`
    "dataset": str,
    "index": str,
    "index_hash": str,
    "extensions": [str],
    "shards": [list],
    "?classes": [str],
    "?build": dict,
    "?source": str,
    "?tokens": _TOKENS_SCHEMA,
}


def _is_shard(row: list[Any]) -> bool:
    """Whether a row of the JSON file is (name, bytes, samples, hash) of a shard in the folder of the manifest."""
    if len(row) != 4 or schema_error(row, [(str, int)]):
        return False
    name, size, count, digest = row
    if not isinstance(name, str) or not isinstance(digest, str) or schema_error([size, count], [int]):
        return False
    return 0 <= count <= size < 1 << 60 and ".." not in name.split("/")


class ForeignManifest(DataError):
    """A manifest.json of another program, which must not be replaced."""


def _is_ours(text: str | bytes) -> bool:
    """Whether the content of a manifest.json, which may be damaged, was written by `render_manifest`. An empty file
    counts as ours, because nothing is lost if it is replaced."""
    start = text[:64].encode() if isinstance(text, str) else text[:64]
    return not start.strip() or re.match(rb'\{\s*"format":\s*\d+\s*,\s*"dataset":', start) is not None


def parse_manifest(text: str | bytes, folder: str, source: str) -> Manifest:
    """Parse the content of a manifest file. Raises DataError, or ForeignManifest if another program wrote the file;
    `source` is the name of the file in its message."""
    try:
        content = loads(text)
        version = content.pop("format")
        if version != FORMAT:
            if not _is_ours(text):
                raise ValueError(f"format is {short_repr(version)}")
            raise DataError(
                f"{source}: has format {version}, but this version reads {FORMAT}; run `unlabeled shards index` again"
            )
        json.dumps(content, ensure_ascii=False).encode()  # raises ValueError for an unpaired surrogate
        if wrong := schema_error(content, _SCHEMA):
            raise ValueError(wrong)
        shards = content.pop("shards")
        if not all(map(_is_shard, shards)) or "/" in content["index"]:
            raise ValueError("a row of shards is not name, bytes, samples and hash")
        if not re.fullmatch(
            "([0-9a-f]{32})?", content["index_hash"]
        ):  # it becomes the name of a file; "" in a run folder
            raise ValueError(f"index_hash is {short_repr(content['index_hash'])}")
        extensions = content.pop("extensions")
        if not all(map(VALID_EXTENSION.fullmatch, extensions)) or len({*extensions}) < len(extensions):
            raise ValueError(f"extensions is {short_repr(extensions)}")
        tokens = content.get("tokens", {"dtype": "<u2", "block": 1, "shards": {}})
        shortest = min(tokens["shards"].values(), default=2)
        if tokens["dtype"] not in ("<u2", "<u4") or tokens["block"] < 1 or shortest < 2:
            raise ValueError("tokens has another type than <u2 and <u4, or a shard of less than 2 tokens")
        return Manifest.of_shards(
            shards,
            extensions,
            {key: value for key, value in content.items() if key not in MANIFEST_KEYS},
            folder=folder,
            index=f"{folder}/{content['index']}",
            index_hash=content["index_hash"],
            id=content["dataset"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not _is_ours(text):
            raise ForeignManifest(
                f"{source}: was not written by `unlabeled shards index`; move it to another folder, as the manifest of"
                " the shards has to have this name"
            ) from None
        raise DataError(
            f"{source}: is not a valid shard manifest ({error}); run `unlabeled shards index` again"
        ) from None


def render_manifest(manifest: Manifest) -> str:
    """The content of manifest.json, with one line per shard."""
    head = {
        "format": FORMAT,
        "dataset": manifest.id,
        "samples": manifest.samples,
        "bytes": manifest.total_bytes,
        "extensions": manifest.extensions,
        "index": manifest.index.rpartition("/")[2],
        "index_hash": manifest.index_hash,
        **manifest.details,
        "columns": ["name", "bytes", "samples", "xxh3-128"],
    }
    lines = [json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "shards": [']
    lines.append(",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in manifest.shards))
    return "\n".join(lines) + "\n ]\n}\n"


def load_manifest(folder: str) -> Manifest | None:
    """The manifest of a folder; None if it has none."""
    folder = folder.rstrip("/")
    fs, path = open_store(folder)
    where = f"{folder}/{MANIFEST}"
    try:
        text = with_retries(where, lambda: fs.cat_file(f"{path.rstrip('/')}/{MANIFEST}"))
    except MissingFile:
        return None
    return parse_manifest(text, folder, where)
