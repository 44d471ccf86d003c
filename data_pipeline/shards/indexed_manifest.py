"""Manifests opened with their index, from which the records of any samples are read: found for folders, tars and globs,
and checked against the shards that exist.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import xxhash

from common import output
from common.errors import DataError
from data_pipeline.shards.index import index_in_cache
from data_pipeline.shards.manifest import Manifest, load_manifest
from data_pipeline.shards.tar_scan import RECORD
from data_pipeline.storage.ranges import READ_ATTEMPTS, MissingFile, OpenFile, RangeReader
from data_pipeline.storage.urls import (
    cache_folder,
    compressed_tar_hint,
    exclusive,
    find_shards,
    is_local,
    write_atomically,
)

INDEX_PART_BYTES = 8 << 20  # bytes of an index that one request reads
MAX_COPIED_INDEX_BYTES = 1 << 30  # a larger index of a remote set is read by range instead of being copied


def open_manifests(
    specs: Iterable[str], say: Callable[[str], None] = output.say, further: Iterable[str] = ()
) -> list[tuple[Manifest, np.ndarray]]:
    """[(manifest, int [n] numbers of the shards in it that hold samples)] for folders, tars and globs, in order.

    Shards without a manifest are indexed into the cache folder, see `index_in_cache` for `further`.
    """
    out: list[tuple[Manifest, np.ndarray]] = []
    for spec in specs:
        names_folder = not (spec.endswith(".tar") or compressed_tar_hint(spec) or any(c in spec for c in "*?["))
        manifest = load_manifest(spec) if names_folder else None
        if manifest is not None:
            _check_listed_shards(manifest, spec)
            out.append((manifest, np.flatnonzero(manifest.counts)))
            continue
        urls = find_shards([spec])
        folders = dict.fromkeys(url.rpartition("/")[0] for url in urls)
        for folder in folders:
            in_folder = [url for url in urls if url.rpartition("/")[0] == folder]
            manifest = load_manifest(folder) if folder else None
            if manifest is None:
                manifest = index_in_cache(in_folder, say, further)
                rows = np.arange(len(in_folder))
            else:
                _check_listed_shards(manifest, folder)
                row_of = {name: row for row, name in enumerate(manifest.names)}
                names = [url.rpartition("/")[2] for url in in_folder]
                if new := [name for name in names if name not in row_of]:  # of a remote folder
                    raise _differs(folder, new[0], "is new")
                rows = np.array([row_of[name] for name in names])
            out.append((manifest, rows[manifest.counts[rows] > 0]))
    return out


def _check_listed_shards(manifest: Manifest, folder: str) -> None:
    """Raises DataError if a manifest does not list the shards that its folder holds.

    Remote folders are not compared, because a listing may have a million objects.
    """
    if not is_local(folder):
        return
    path = folder.removeprefix("file://").removeprefix("local://")
    present = {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith(".tar")}
    listed = dict(zip(manifest.names, manifest.sizes.tolist(), strict=True))
    for name in sorted(present.keys() | listed.keys()):
        if present.get(name) != listed.get(name):
            what = "is gone" if name not in present else "is new" if name not in listed else "has another size"
            raise _differs(folder, name, what)


def _differs(folder: str, name: str, what: str) -> DataError:
    """The error for a shard that is not as the manifest of its folder says."""
    return DataError(
        f"{folder}: {name} {what} since the manifest was written; run `unlabeled shards index {folder}` again"
    )


class IndexedManifest:
    """A manifest with its index. The index is a local file, a local copy of a remote file, or a large remote file that
    is read by range. `rows`: the numbers of those shards in the manifest that the dataset consists of.

    The file is not memory-mapped: if a mapped file is truncated, SIGBUS ends the process.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray, reader: RangeReader):
        self.manifest, self.rows, self.reader = manifest, rows, reader
        self._first = np.concatenate([[0], np.cumsum(manifest.counts)])  # first sample of each shard of the manifest
        self._file: _IndexFile | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[IndexedManifest], tuple[Manifest, np.ndarray, RangeReader]]:
        return IndexedManifest, (self.manifest, self.rows, self.reader)  # another process opens the file again

    def records(self, shard: int, row: int, count: int) -> np.ndarray:
        """The index records [count, extensions] of a shard's samples [row, row + count)."""
        width = len(self.manifest.extensions)
        begin = int(self._first[shard]) + row
        total = int(self._first[-1]) * width * RECORD.itemsize
        with self._lock:
            if self._file is None and (is_local(self.manifest.index) or total <= MAX_COPIED_INDEX_BYTES):
                self._file = _IndexFile(self.manifest, total, self.reader)
        size = width * RECORD.itemsize
        if self._file is not None:
            data = self._file.read(begin * size, count * size)
        else:
            data = self.reader.range(self.manifest.index, begin * size, (begin + count) * size)
        if len(data) != count * size:
            raise DataError(
                f"{self.manifest.index}: is cut short; run `unlabeled shards index {self.manifest.folder}` again"
            )
        return np.frombuffer(data, RECORD).reshape(count, width)


class _IndexFile:
    """The whole index as an open local file. A remote index is first copied into the cache folder and checked."""

    def __init__(self, manifest: Manifest, size: int, reader: RangeReader):
        url, self.size = manifest.index, size
        if is_local(url):
            self.path = Path(url.removeprefix("file://").removeprefix("local://"))
            if manifest.folder:
                self.advice = f"run `unlabeled shards index {manifest.folder}` again"
            else:
                self.advice = f"delete {self.path.parent}, which the next start creates again"
        else:
            self.path = cache_folder("index") / f"{manifest.index_hash}.bin"
            self.advice = f"delete {self.path}, which the next start copies again from {url}"
            if not self._is_copied():
                with exclusive(self.path.with_suffix(".lock")):  # one process of a machine downloads it
                    if not self._is_copied():
                        write_atomically(str(self.path), _download_index(manifest, size, reader))
        try:
            self.file = OpenFile(str(self.path))
        except MissingFile:
            raise DataError(f"{self.path}: no such file; {self.advice}") from None
        self._check()

    def _is_copied(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    def _check(self) -> None:
        found = os.fstat(self.file.number).st_size
        if found != self.size:
            raise DataError(f"{self.path}: holds {found} bytes instead of {self.size}; {self.advice}")

    def read(self, begin: int, size: int) -> bytes:
        data = os.pread(self.file.number, size, begin)
        if len(data) != size:
            self._check()
        return data


def _download_index(manifest: Manifest, size: int, reader: RangeReader) -> list[bytes]:
    """Read a remote index in parts. If its hash is wrong, which may be an error of the network, read it again, and
    after READ_ATTEMPTS attempts raise DataError."""
    for _ in range(READ_ATTEMPTS):
        parts = [
            reader.range(manifest.index, at, min(size, at + INDEX_PART_BYTES))
            for at in range(0, size, INDEX_PART_BYTES)
        ]
        if xxhash.xxh3_128_hexdigest(b"".join(parts)) == manifest.index_hash:
            return parts
    raise DataError(
        f"{manifest.index}: is not the index that belongs to the manifest; run `unlabeled shards index` again"
    )
