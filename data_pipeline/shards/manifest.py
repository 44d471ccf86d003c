"""The manifest of a shard set, `manifest.json`: its shards with their sizes, numbers of samples and hashes, the
extensions of their members, the names of the classes, and where the set came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
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
    """A shard set: the names of S shards in `folder`, or their full URLs if `folder` is empty."""

    folder: str
    names: list[str]
    sizes: np.ndarray  # int64 [S], bytes
    counts: np.ndarray  # int64 [S], samples
    hashes: list[str]  # xxh3-128 of each shard
    extensions: list[str]  # of the members, in the order of the columns of the index
    details: dict[str, Any]  # the other keys of the file: classes, source, …
    index: str  # URL of the index file
    index_hash: str  # xxh3-128 of it
    id: str  # see `dataset_id`

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
        """The members that are not part of any sample, and why."""
        return LeftOut(self.details.get("left_out", {}))

    @property
    def pixels(self) -> dict[str, Any]:
        """Options of `Encoded` with which the images of the set are decoded, if they differ from the defaults."""
        return {name: self.details[name] for name in ("bits", "as_stored") if name in self.details}

    def url(self, shard: int) -> str:
        return f"{self.folder}/{self.names[shard]}" if self.folder else self.names[shard]

    def first_difference(self, other: Manifest) -> str:
        """The first difference between this manifest and a later one, as text; "" if they list the same shards."""
        mine, theirs = (
            {n: (int(b), int(c), h) for n, b, c, h in zip(m.names, m.sizes, m.counts, m.hashes, strict=True)}
            for m in (self, other)
        )
        for name, entry in mine.items():
            if name not in theirs:
                return f"{name} does not exist any more ({len(mine)} shards then, {len(theirs)} now)"
            if theirs[name] != entry:
                then, now = (f"{samples} samples in {size} bytes" for size, samples, _ in (entry, theirs[name]))
                return f"{name} had {then}, now {now}" if then != now else f"the bytes of {name} have changed"
        for name in theirs:
            if name not in mine:
                return f"{name} is new ({len(mine)} shards then, {len(theirs)} now)"
        return "" if self.names == other.names else "the shards are in another order"


def dataset_id(names: Iterable[str], sizes: Iterable[int], counts: Iterable[int], hashes: Iterable[str]) -> str:
    """A hash of every byte of a shard set and of the order of its samples. It does not depend on the folder."""
    out = xxhash.xxh3_128()
    for name, size, count, digest in zip(names, sizes, counts, hashes, strict=True):
        out.update(f"{name.rpartition('/')[2]}\0{size}\0{count}\0{digest}\n".encode())
    return out.hexdigest()


_TOKENS_SHAPE = {
    **{"format": int, "dtype": str, "block": int, "vocabulary": int, "tokenizer": str, "pad": int},
    **{"shards": {...: int}, "documents": int, "tokens": int, "bytes": int},
}
_SHAPE = {  # of the JSON file, see `schema_error`
    **{"dataset": str, "index": str, "index_hash": str, "extensions": [str], "shards": [list]},
    **{"?classes": [str], "?build": dict, "?source": str, "?tokens": _TOKENS_SHAPE},
}


def _is_row(name: Any = "", size: Any = "", count: Any = "", digest: Any = "", *more: Any) -> bool:
    """Whether the values are a manifest's row of a shard whose file is below the folder of the manifest."""
    well_formed = (
        isinstance(name, str) and isinstance(digest, str) and not schema_error([size, count], [int]) and not more
    )
    return well_formed and 0 <= count <= size < 1 << 60 and ".." not in name.split("/")


class ForeignManifest(DataError):
    """A manifest.json that this program has not written, so that it may not replace it."""


def _is_ours(text: str | bytes) -> bool:
    """Whether the content of a manifest.json, which may be damaged, was written by `render_manifest`. An empty file
    counts as ours: nothing is lost if it is replaced."""
    start = text[:64].encode() if isinstance(text, str) else text[:64]
    return not start.strip() or re.match(rb'\{\s*"format":\s*\d+\s*,\s*"dataset":', start) is not None


def parse_manifest(text: str | bytes, folder: str, source: str) -> Manifest:
    """A manifest from the content of its file. Raises DataError that begins with `source`: ForeignManifest if something
    else has written it."""
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
        if wrong := schema_error(content, _SHAPE):
            raise ValueError(wrong)
        rows = content.pop("shards")
        if any(schema_error(row, [(str, int)]) or not _is_row(*row) for row in rows) or "/" in content["index"]:
            raise ValueError("a row of shards is not name, bytes, samples and hash")
        extensions = content.pop("extensions")
        if not all(map(VALID_EXTENSION.fullmatch, extensions)) or len({*extensions}) < len(extensions):
            raise ValueError(f"extensions is {short_repr(extensions)}")
        tokens = content.get("tokens", {"dtype": "<u2", "block": 1, "shards": {}})
        if (
            tokens["dtype"] not in ("<u2", "<u4")
            or tokens["block"] < 1
            or min(tokens["shards"].values(), default=2) < 2
        ):
            raise ValueError("tokens has another type than <u2 and <u4, or a shard of less than 2 tokens")
        names, sizes, counts, hashes = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
        return Manifest(
            folder,
            names,
            np.array(sizes, np.int64),
            np.array(counts, np.int64),
            hashes,
            extensions,
            {k: v for k, v in content.items() if k not in MANIFEST_KEYS},
            f"{folder}/{content.pop('index')}",
            content.pop("index_hash"),
            content["dataset"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if not _is_ours(text):
            raise ForeignManifest(
                f"{source}: was not written by `unlabeled shards index`; move it to another folder, as the manifest of"
                " the shards has to have this name"
            ) from None
        raise DataError(f"{source}: is no shard manifest ({error}); run `unlabeled shards index` again") from None


def render_manifest(manifest: Manifest) -> str:
    """The content of manifest.json, a line per shard."""
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
    rows = zip(manifest.names, manifest.sizes.tolist(), manifest.counts.tolist(), manifest.hashes, strict=True)
    lines.append(",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows))
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
