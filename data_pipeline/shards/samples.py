"""Samples of a list of shards, by number: found in the index, read by byte range, checked against their hash.

A shard is a plain tar. The members of one sample follow each other and share their name up to the first dot:
`0000007-oak.jpg`, `0000007-oak.cls` (the number of the label), `0000007-oak.json`. `tar` and `webdataset` can read
these shards.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common import output
from common.errors import Absent, Damaged, DataError
from common.untrusted import is_number, open_tar, tar_members
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.image_formats import IMAGE_MEMBERS, MAX_PIXELS
from data_pipeline.shards.dataset import Part, Piece
from data_pipeline.shards.index import index_in_cache
from data_pipeline.shards.manifest import Manifest, dataset_id, load_manifest
from data_pipeline.shards.members import MEMBER_NAME, check_extensions, in_order, no_samples_message
from data_pipeline.shards.tar_scan import RECORD
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.storage.ranges import READ_ATTEMPTS, MissingFile, OpenFile, RangeReader
from data_pipeline.storage.urls import (
    cache_folder,
    compressed_tar_hint,
    exclusive,
    find_shards,
    is_local,
    write_atomically,
)

INDEX_PART_BYTES = 8 << 20  # of an index that one request asks for
MAX_COPIED_INDEX_BYTES = 1 << 30  # a larger index of a remote set is read by range instead of being copied


class Samples:
    """All samples of the shards that `specs` name (folders, tars, globs; local or any fsspec URL), in order.

    `read` returns the bytes of the members, `image` a decoded image. `extensions` are those of all members in the set.
    An image of more than `max_pixels` counts as damaged. `further`: extensions to index in addition to those that
    always are, if the shards have no index yet.
    """

    length = 0
    unit = "samples"

    def __init__(
        self,
        specs: Iterable[str],
        reader: RangeReader | None = None,
        say: Callable[[str], None] = output.say,
        max_pixels: int = MAX_PIXELS,
        further: Iterable[str] = (),
    ):
        specs, self.further = list(specs), check_extensions(further)
        self.specs, self.names, self.max_pixels = specs, ", ".join(specs), max_pixels
        self.reader = reader or RangeReader()
        self.manifests = [
            _IndexedManifest(m, rows, self.reader) for m, rows in open_manifests(specs, say, self.further)
        ]
        self.extensions = in_order(e for indexed in self.manifests for e in indexed.manifest.extensions)
        counts = np.concatenate(
            [indexed.manifest.counts[indexed.rows] for indexed in self.manifests] or [np.zeros(0, int)]
        )
        self.first = np.concatenate([[0], np.cumsum(counts)])  # sample number at which each shard begins
        # The number of the spec that each shard belongs to, and the number of the first shard of each spec.
        self._spec_of = np.repeat(np.arange(len(self.manifests)), [len(indexed.rows) for indexed in self.manifests])
        self._spec_first = np.concatenate([[0], np.cumsum([len(indexed.rows) for indexed in self.manifests])])
        if not len(self):
            raise DataError(
                f"{self.names or 'data'}: {no_samples_message(p.manifest.left_out for p in self.manifests)}"
            )

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def id(self) -> str:
        """A hash of every byte and of the order of the shards."""
        out = xxhash.xxh3_128()
        for indexed in self.manifests:
            m, rows = indexed.manifest, indexed.rows
            complete = len(rows) == len(m.names)
            picked = ([column[i] for i in rows] for column in (m.names, m.sizes, m.counts, m.hashes))
            out.update((m.id if complete else dataset_id(*picked)).encode())
        return out.hexdigest()

    @property
    def vocabulary(self) -> Vocabulary | None:
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which another process opens the same samples."""
        return {"specs": self.specs, "further": self.further}

    @property
    def total_bytes(self) -> int:
        return sum(int(indexed.manifest.sizes[indexed.rows].sum()) for indexed in self.manifests)

    def merged(self) -> Manifest:
        """One manifest of all specs. A shard is named N/NAME, with N the number of its spec, wherever it is stored."""
        rows = [(indexed, n, int(row)) for n, indexed in enumerate(self.manifests) for row in indexed.rows]
        names = [f"{n}/{indexed.manifest.names[row].rpartition('/')[2]}" for indexed, n, row in rows]
        sizes, counts = (np.array([getattr(p.manifest, k)[r] for p, _, r in rows]) for k in ("sizes", "counts"))
        hashes = [p.manifest.hashes[row] for p, _, row in rows]
        return Manifest("", names, sizes, counts, hashes, self.extensions, {"specs": self.specs}, "", "", self.id)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample."""
        shard = int(np.searchsorted(self.first, number, "right")) - 1
        return shard, number - int(self.first[shard])

    def place(self, number: int) -> tuple[str, int]:
        """(shard, number in the shard, from 0) of a sample, without reading anything."""
        shard, row = self.locate(number)
        return self.url(shard), row

    def url(self, shard: int) -> str:
        """The URL of a shard, by its number in the whole set."""
        spec = int(self._spec_of[shard])
        indexed = self.manifests[spec]
        return indexed.manifest.url(int(indexed.rows[shard - self._spec_first[spec]]))

    def pieces(self, number: int, count: int) -> list[Piece]:
        """The samples [number, number + count) as pieces, one for each shard."""
        out = []
        while count > 0:
            shard, row = self.locate(number)
            take = min(count, int(self.first[shard + 1]) - number)
            spec = int(self._spec_of[shard])
            indexed = self.manifests[spec]
            found = indexed.records(int(indexed.rows[shard - self._spec_first[spec]]), row, take)
            if indexed.manifest.extensions != self.extensions:
                own, found = found, np.zeros((take, len(self.extensions)), RECORD)
                for column, extension in enumerate(indexed.manifest.extensions):
                    found[:, self.extensions.index(extension)] = own[:, column]
            out.append(Piece(number, self.url(shard), found))
            number, count = number + take, count - take
        return out

    def name(self, number: int) -> tuple[str, str]:
        """(shard, key) of a sample, read from the headers of the tar."""
        _, row = self.locate(number)
        first = max(row - 1, 0)
        (piece,) = self.pieces(number - row + first, row - first + 1)
        begin = 0
        if row:
            before = piece.records[0]
            begin = int((before["offset"] + before["size"])[before["offset"] > 0].max() + 511) // 512 * 512
        offsets = piece.records[-1]["offset"]
        try:
            header = self.reader.range(piece.url, begin, int(offsets[offsets > 0].min()))
            return piece.url, _last_key(header) or f"sample {row}"
        except DataError:
            return piece.url, f"sample {row}"

    def hashes(self, extensions: Sequence[str]) -> np.ndarray:
        """uint64 [N]: for each sample the hash of its first member among `extensions`, or 0 if it has none.

        Equal members have equal hashes.
        """
        out = np.zeros(len(self), np.uint64)
        for piece in self.pieces(0, len(self)):
            own = out[piece.first : piece.first + len(piece.records)]
            for column in reversed(self.columns(extensions)):
                present = piece.records[:, column]["offset"] > 0
                own[present] = piece.records[present, column]["hash"]
        return out

    def read(self, number: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """{extension: bytes} of a sample's members, or of those with the given extensions, each checked.

        Raises `Damaged` if they differ from the index.
        """
        extensions = self.extensions if extensions is None else extensions
        return {self.extensions[c]: data for c, data in self.read_columns(number, self.columns(extensions)).items()}

    def read_columns(self, number: int, columns: list[int]) -> dict[int, bytes]:
        """As `read`, but {column of the index: bytes}."""
        (piece,) = self.pieces(number, 1)
        rows = piece.records[0].tolist()  # (offset, size, hash) of each column; plain numbers are quicker than numpy's
        present = {c: rows[c] for c in columns if rows[c][0]}
        begin = min((offset for offset, _, _ in present.values()), default=0)
        end = max((offset + size for offset, size, _ in present.values()), default=0)
        for second_time in (False, True):  # a second read tells an error on the way from a damaged file
            data = self.reader.range(piece.url, begin, end)
            try:
                return {
                    c: check(data[offset - begin : offset - begin + size], size, digest)
                    for c, (offset, size, digest) in present.items()
                }
            except Damaged:
                if second_time:
                    raise
        raise AssertionError

    def columns(self, extensions: Iterable[str]) -> list[int]:
        """The columns of these extensions in the records, without unknown ones."""
        wanted = set(extensions)
        return [c for c, e in enumerate(self.extensions) if e in wanted]

    def ranges(self, piece: Piece, columns: list[int]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """(the offset of the first byte, the byte range) of the wanted members of a piece."""
        begin, end = span(piece.records, columns)
        return begin, ((begin, end),)

    def checked(self, number: int, members: dict[int, Any]) -> dict[int, Any]:
        """The members as they are: the client of the prefetch server has checked every hash of the index."""
        return members

    def sample(self, number: int, members: dict[int, Any], parts: Mapping[str, Part]) -> dict[str, Any]:
        """The sample that the views get: the value of each part, by the part's name. Raises `Damaged`."""
        by_extension: dict[str, bytes] = {self.extensions[c]: data for c, data in members.items()}
        known, out = self.known(number), {}
        for name, part in parts.items():
            own = {e: by_extension[e] for e in part.extensions if e in by_extension}
            if not own:
                raise part.absent()
            out[name] = part.decode(own, known)
        return out

    def known(self, number: int) -> dict[str, Any]:
        """What the manifest of a sample says of all its samples: options for decoding ("pixels"), and names of classes
        ("classes").
        """
        manifest = self._manifest(number)
        return {"pixels": manifest.pixels, "classes": manifest.classes}

    def encoded(self, number: int, data: bytes, extension: str, channels: int = 3) -> Encoded:
        """An image of a sample, with the options for decoding that its manifest gives."""
        return Encoded(data, extension, channels, **self._manifest(number).pixels, max_pixels=self.max_pixels)

    def _manifest(self, number: int) -> Manifest:
        return self.manifests[int(self._spec_of[self.locate(number)[0]])].manifest

    def image(self, number: int, channels: int = 3, take: Callable[[int], None] | None = None) -> np.ndarray:
        """The image of a sample, uint8 [H, W, channels]. Raises `Damaged`. `take`: the `reserve` of `Encoded`."""
        for extension, data in self.read(number, IMAGE_MEMBERS).items():
            encoded = self.encoded(number, data, extension, channels)
            encoded.reserve = take
            return encoded.pixels()
        raise Absent(f"holds no image member ({', '.join(IMAGE_MEMBERS)})")

    def label(self, number: int) -> str:
        """The label of a sample: the name of its class if the manifest has names, otherwise the text of its `cls`
        member.
        """
        data = self.read(number, ("cls",)).get("cls")
        if data is None:
            shard, key = self.name(number)
            raise DataError(f"{shard}: {key} has no .cls member, so it has no label to score with")
        names = self._manifest(number).classes
        text = data.decode(errors="replace").strip()
        return names[int(text)] if names and is_number(text) and int(text) < len(names) else text


# ---------------------------------------------------------------- bytes
def span(records: np.ndarray, columns: list[int]) -> tuple[int, int]:
    """The byte range [begin, end) of the wanted members of samples in one shard."""
    wanted = records[:, columns]
    offsets, sizes = wanted["offset"].astype(np.int64), wanted["size"].astype(np.int64)
    present = offsets > 0
    if not present.any():
        return 0, 0
    return int(offsets[present].min()), int((offsets + sizes)[present].max())


def check(data: bytes, size: int, digest: int) -> bytes:
    """The same bytes. Raises `Damaged` if length or hash differ from the index."""
    if len(data) != size:
        raise Damaged(f"{len(data)} of {size} bytes could be read")
    found = xxhash.xxh3_64_intdigest(data)
    if found != digest:
        raise Damaged(f"the bytes are not those that were indexed: their hash is {found:016x}, not {digest:016x}")
    return data


def _last_key(header: bytes) -> str | None:
    """The key of the member whose header is the last one in these bytes."""
    key = None
    try:
        with open_tar(io.BytesIO(header)) as tar:
            for member in tar_members(tar):
                match = MEMBER_NAME.match(member.name)
                key = match[1] if match else key
    except tarfile.TarError:
        pass  # the bytes end before the data of the last member
    return key


# ---------------------------------------------------------------- manifests
def open_manifests(
    specs: Iterable[str], say: Callable[[str], None] = output.say, further: Iterable[str] = ()
) -> list[tuple[Manifest, np.ndarray]]:
    """[(manifest, rows of its shards)] for folders, tars and globs, in order.

    Shards without a manifest are indexed into the cache folder, see `index_in_cache` for `further`.
    """
    out: list[tuple[Manifest, np.ndarray]] = []
    for spec in specs:
        whole = (
            None
            if spec.endswith(".tar") or compressed_tar_hint(spec) or any(c in spec for c in "*?[")
            else load_manifest(spec)
        )
        if whole is not None:
            _compare(whole, spec)
            out.append((whole, np.flatnonzero(whole.counts)))
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
                _compare(manifest, folder)
                places = {name: i for i, name in enumerate(manifest.names)}
                rows = np.array([places[url.rpartition("/")[2]] for url in in_folder])
            out.append((manifest, rows[manifest.counts[rows] > 0]))
    return out


def _compare(manifest: Manifest, folder: str) -> None:
    """Raises DataError if a manifest does not list the shards that its folder holds.

    Remote folders are not compared, because a listing may have a million objects.
    """
    if not is_local(folder):
        return
    path = folder.removeprefix("file://")
    present = {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith(".tar")}
    listed = dict(zip(manifest.names, manifest.sizes.tolist(), strict=True))
    for name in sorted(present.keys() | listed.keys()):
        if present.get(name) != listed.get(name):
            what = "is gone" if name not in present else "is new" if name not in listed else "has another size"
            raise DataError(
                f"{folder}: {name} {what} since the manifest was written; run `unlabeled shards index {folder}` again"
            )


class _IndexedManifest:
    """A manifest with its index, which is a local file, a local copy of a remote one, or, if that is large, read by
    range.

    The file is not memory-mapped: if a mapped file is truncated, SIGBUS ends the process.
    """

    def __init__(self, manifest: Manifest, rows: np.ndarray, reader: RangeReader):
        self.manifest, self.rows, self.reader = manifest, rows, reader
        self._first = np.concatenate([[0], np.cumsum(manifest.counts)])
        self._file: _IndexFile | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_IndexedManifest], tuple[Manifest, np.ndarray, RangeReader]]:
        return _IndexedManifest, (self.manifest, self.rows, self.reader)  # another process opens the file itself

    def records(self, shard: int, row: int, count: int) -> np.ndarray:
        """[count, extensions] of consecutive samples of a shard."""
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
    """The whole index as an open local file. A remote one is first copied into the cache folder and checked."""

    def __init__(self, manifest: Manifest, size: int, reader: RangeReader):
        url, self.size = manifest.index, size
        if is_local(url):
            self.path = Path(url.removeprefix("file://").removeprefix("local://"))
            own = f"run `unlabeled shards index {manifest.folder}` again"
            made = f"delete {self.path.parent}, which is made anew at the next start"
            self.todo = own if manifest.folder else made
        else:
            self.path = cache_folder("index") / f"{manifest.index_hash}.bin"
            self.todo = f"delete {self.path}, which is copied anew from {url} at the next start"
            if not self._is_copied():
                with exclusive(self.path.with_suffix(".lock")):  # one process of a machine downloads it
                    if not self._is_copied():
                        write_atomically(str(self.path), _download_index(manifest, size, reader))
        try:
            self.file = OpenFile(str(self.path))
        except MissingFile:
            raise DataError(f"{self.path}: no such file; {self.todo}") from None
        self._check()

    def _is_copied(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    def _check(self) -> None:
        found = os.fstat(self.file.number).st_size
        if found != self.size:
            raise DataError(f"{self.path}: holds {found} bytes instead of {self.size}; {self.todo}")

    def read(self, begin: int, size: int) -> bytes:
        data = os.pread(self.file.number, size, begin)
        if len(data) != size:
            self._check()
        return data


def _download_index(manifest: Manifest, size: int, reader: RangeReader) -> list[bytes]:
    """Read a remote index in parts, again if its hash is wrong, which may be an error on the way. Raises DataError."""
    for _ in range(READ_ATTEMPTS):
        parts = [
            reader.range(manifest.index, at, min(size, at + INDEX_PART_BYTES))
            for at in range(0, size, INDEX_PART_BYTES)
        ]
        if xxhash.xxh3_128_hexdigest(b"".join(parts)) == manifest.index_hash:
            return parts
    raise DataError(
        f"{manifest.index}: is not the index that the manifest was written with; run `unlabeled shards index` again"
    )
