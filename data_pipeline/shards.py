"""Samples of a list of shards, by number: located by the index, read by range, checked against their hash.

A shard is a plain tar; the members of one sample follow each other and share the name up to the first dot: `0000007-oak.jpg`,
`0000007-oak.cls` (the label's number), `0000007-oak.json`. `tar` and `webdataset` read them.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline import index
from data_pipeline.decode import PICTURES, Damaged, Encoded, decode_image
from data_pipeline.fetch import Fetcher
from data_pipeline.index import MEMBERS, RECORD, Manifest
from data_pipeline.plan import Phase, Plan
from data_pipeline.storage import DataError, cache_folder, find_shards, is_local, write_whole

if TYPE_CHECKING:
    from data_pipeline.rows import Rows

PART = 8 << 20  # bytes of one request for it
LOOKS = 10  # at what a store gives with a wrong hash
COPIED_INDEX = 1 << 30  # bytes; the index of a remote set is copied up to this size, and read by range beyond it


@dataclass
class Look:
    """What is made of the bytes, beside the objective's views."""

    extensions: tuple[str, ...] = PICTURES  # the members that are read
    channels: int = 3
    color: str = "exact"  # or "fused", "device": see views.py


class Piece(NamedTuple):
    """Consecutive samples of one shard, `records` [n, extensions of the set]."""

    first: int
    url: str
    records: np.ndarray
    ranges: tuple[tuple[int, int], ...] = ()  # of bytes, where they do not follow from the records (rows.py)


class Samples:
    """All samples of the shards that `specs` name (folders, tars, globs; local or any fsspec URL), in order.

    `read` gives raw bytes; `image` a decoded image, or raises `Damaged`. `extensions` says which members there are.
    """

    def __init__(self, specs: Iterable[str], fetcher: Fetcher | None = None, say: Callable[[str], None] = print):
        specs = list(specs)
        self.specs, self.names = specs, ", ".join(specs)
        self.fetcher = fetcher or Fetcher()
        self.manifests = [_Indexed(m, rows, self.fetcher) for m, rows in open_manifests(specs, say)]
        held = {e for part in self.manifests for e in part.manifest.extensions}
        self.extensions = [e for e in MEMBERS if e in held]
        counts = np.concatenate([part.manifest.counts[part.rows] for part in self.manifests] or [np.zeros(0, int)])
        self.first = np.concatenate([[0], np.cumsum(counts)])  # sample number at which each shard begins
        self._part_of = np.repeat(np.arange(len(self.manifests)), [len(part.rows) for part in self.manifests])
        self._part_first = np.concatenate([[0], np.cumsum([len(part.rows) for part in self.manifests])])
        if not len(self):
            raise DataError(f"{self.names or 'data'}: no samples; the members that count end in {', '.join(MEMBERS)}")

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def id(self) -> str:
        """A hash of every byte and of the order of the shards."""
        out = xxhash.xxh3_128()
        for part in self.manifests:
            m, rows = part.manifest, part.rows
            whole = len(rows) == len(m.names)
            picked = ([column[i] for i in rows] for column in (m.names, m.sizes, m.counts, m.hashes))
            out.update((m.id if whole else index.dataset_id(*picked)).encode())
        return out.hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """What opens the same samples in another process."""
        return {"specs": self.specs}

    @property
    def total_bytes(self) -> int:
        return sum(int(part.manifest.sizes[part.rows].sum()) for part in self.manifests)

    def merged(self) -> Manifest:
        """One manifest of all parts; shards are named part/name, wherever they lie."""
        rows = [(part, n, int(row)) for n, part in enumerate(self.manifests) for row in part.rows]
        names = [f"{n}/{part.manifest.names[row].rpartition('/')[2]}" for part, n, row in rows]
        sizes, counts = (np.array([getattr(p.manifest, k)[r] for p, _, r in rows]) for k in ("sizes", "counts"))
        hashes = [p.manifest.hashes[row] for p, _, row in rows]
        return Manifest("", names, sizes, counts, hashes, self.extensions, {"specs": self.specs}, "", "", self.id)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row inside it) of a sample."""
        shard = int(np.searchsorted(self.first, number, "right")) - 1
        return shard, number - int(self.first[shard])

    def url(self, shard: int) -> str:
        part = int(self._part_of[shard])
        held = self.manifests[part]
        return held.manifest.url(int(held.rows[shard - self._part_first[part]]))

    def pieces(self, number: int, count: int) -> list[Piece]:
        """Where the samples [number, number + count) lie, a piece per shard."""
        out = []
        while count > 0:
            shard, row = self.locate(number)
            take = min(count, int(self.first[shard + 1]) - number)
            part = int(self._part_of[shard])
            held = self.manifests[part]
            found = held.records(int(held.rows[shard - self._part_first[part]]), row, take)
            if held.manifest.extensions != self.extensions:
                own, found = found, np.zeros((take, len(self.extensions)), RECORD)
                for column, extension in enumerate(held.manifest.extensions):
                    found[:, self.extensions.index(extension)] = own[:, column]
            out.append(Piece(number, self.url(shard), found))
            number, count = number + take, count - take
        return out

    def name(self, number: int) -> tuple[str, str]:
        """(shard, key) of a sample, read from the tar's own headers."""
        _, row = self.locate(number)
        first = max(row - 1, 0)
        (piece,) = self.pieces(number - row + first, row - first + 1)
        begin = 0
        if row:
            before = piece.records[0]
            begin = int((before["offset"] + before["size"])[before["offset"] > 0].max() + 511) // 512 * 512
        here = piece.records[-1]["offset"]
        try:
            header = self.fetcher.range(piece.url, begin, int(here[here > 0].min()))
            return piece.url, _last_key(header) or f"sample {row}"
        except DataError:
            return piece.url, f"sample {row}"

    def read(self, number: int, extensions: Iterable[str] = MEMBERS) -> dict[str, bytes]:
        """{extension: bytes} of a sample's members, each checked. Raises `Damaged` where they are not what was indexed."""
        return {self.extensions[c]: data for c, data in self.read_columns(number, self.columns(extensions)).items()}

    def read_columns(self, number: int, columns: list[int]) -> dict[int, bytes]:
        """The same by column of the index."""
        (piece,) = self.pieces(number, 1)
        rows = piece.records[0].tolist()  # (offset, size, hash) of each column; plain numbers are quicker than numpy's
        there = {c: rows[c] for c in columns if rows[c][0]}
        begin = min((offset for offset, _, _ in there.values()), default=0)
        end = max((offset + size for offset, size, _ in there.values()), default=0)
        for last in (False, True):
            data = self.fetcher.range(piece.url, begin, end)
            try:
                return {
                    c: check(data[offset - begin : offset - begin + size], size, digest)
                    for c, (offset, size, digest) in there.items()
                }
            except Damaged:  # of the way, or of the file: a second look tells
                if last:
                    raise
        raise AssertionError

    def columns(self, extensions: Iterable[str]) -> list[int]:
        """Where extensions stand in the records; unknown ones are left out."""
        wanted = set(extensions)
        return [c for c, e in enumerate(self.extensions) if e in wanted]

    def ranges(self, piece: Piece, columns: list[int]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """(the offset of the first byte, the byte ranges) of the wanted members of a piece."""
        begin, end = span(piece.records, columns)
        return begin, ((begin, end),)

    def checked(self, number: int, members: dict[int, Any]) -> dict[int, Any]:
        """The members of a sample by column, as they came from the feeder, which checks every hash that the index has."""
        return members

    def sample(self, number: int, members: dict[int, Any], look: Look) -> dict[str, Any]:
        """What the views get of a sample's members: their bytes by extension, and its image. Raises `Damaged`."""
        out: dict[str, Any] = {self.extensions[c]: data for c, data in members.items()}
        image = next((e for e in PICTURES if e in out), None)
        if image:
            out["image"] = Encoded(out[image], image, look.channels)
        elif set(look.extensions) <= set(PICTURES):
            raise Damaged(f"holds no image member ({', '.join(PICTURES)})")
        return out

    def image(self, number: int, channels: int = 3) -> np.ndarray:
        """The sample's image, uint8 [H, W, channels]."""
        for extension, data in self.read(number, PICTURES).items():
            return decode_image(data, extension, channels)
        raise Damaged(f"holds no image member ({', '.join(PICTURES)})")

    def label(self, number: int) -> str:
        """The sample's label: the class name where the manifest has names, else what its `cls` member says."""
        data = self.read(number, ("cls",)).get("cls")
        if data is None:
            shard, key = self.name(number)
            raise DataError(f"{shard}: {key} has no .cls member, so it has no label to score with")
        names = self.manifests[int(self._part_of[self.locate(number)[0]])].manifest.classes
        text = data.decode(errors="replace").strip()
        return names[int(text)] if names and text.isdigit() and int(text) < len(names) else text


def remember(samples: Sequence[Samples | Rows], folder: Path) -> None:
    """Write down in a run's folder what its data is made of; where that was done before, refuse data that differs, and say where."""
    for n, here in enumerate(samples):
        path, now = folder / f"{n}.json", here.merged()
        if not path.is_file():
            write_whole(str(path), [index.render(now).encode()])
            continue
        then = index.parse(path.read_bytes(), str(folder), str(path))
        if then.id != now.id and (difference := then.first_difference(now)):
            raise DataError(
                f"{here.names}: is not what this run was started on: {difference}. It cannot go on exactly: put the shards back, or start another run"
            )


def plan_of(samples: Sequence[Samples | Rows], phases: list[Phase], seed: int, shuffle: bool) -> Plan:
    """The plan for these datasets: the same in every process."""
    return Plan([len(s) for s in samples], phases, seed, shuffle, [s.total_bytes / len(s) for s in samples])


# ---------------------------------------------------------------- bytes
def span(records: np.ndarray, columns: list[int]) -> tuple[int, int]:
    """[begin, end) of the wanted members of samples in one shard."""
    wanted = records[:, columns]
    offsets, sizes = wanted["offset"].astype(np.int64), wanted["size"].astype(np.int64)
    there = offsets > 0
    if not there.any():
        return 0, 0
    return int(offsets[there].min()), int((offsets + sizes)[there].max())


def check(data: bytes, size: int, digest: int) -> bytes:
    """The same bytes, or `Damaged` where length or hash are not what was indexed."""
    if len(data) != size:
        raise Damaged(f"{len(data)} of {size} bytes could be read")
    found = xxhash.xxh3_64_intdigest(data)
    if found != digest:
        raise Damaged(f"the bytes are not those that were indexed: their hash is {found:016x}, not {digest:016x}")
    return data


def _last_key(header: bytes) -> str | None:
    """The key of the member whose header ends these bytes; they may begin with headers of other members."""
    key = None
    try:
        with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
            for member in tar:
                match = index.MEMBER_NAME.match(member.name)
                key = match[1] if match else key
    except tarfile.TarError:
        pass  # the data of the last member is not there
    return key


# ---------------------------------------------------------------- manifests
def open_manifests(specs: Iterable[str], say: Callable[[str], None] = print) -> list[tuple[Manifest, np.ndarray]]:
    """(manifest, which of its shards) for folders, tars and globs, in order. Shards without a manifest are indexed into the cache folder."""
    out: list[tuple[Manifest, np.ndarray]] = []
    for spec in specs:
        whole = None if spec.endswith(".tar") or any(c in spec for c in "*?[") else index.load(spec)
        if whole is not None:
            _compare(whole, spec)
            out.append((whole, np.flatnonzero(whole.counts)))
            continue
        urls = find_shards([spec])
        folders = dict.fromkeys(url.rpartition("/")[0] for url in urls)
        for folder in folders:
            here = [url for url in urls if url.rpartition("/")[0] == folder]
            manifest = index.load(folder) if folder else None
            if manifest is None:
                manifest = index.in_cache(here, say)
                rows = np.arange(len(here))
            else:
                _compare(manifest, folder)
                places = {name: i for i, name in enumerate(manifest.names)}
                rows = np.array([places[url.rpartition("/")[2]] for url in here])
            out.append((manifest, rows[manifest.counts[rows] > 0]))
    return out


def _compare(manifest: Manifest, folder: str) -> None:
    """Refuse a manifest that does not list what its folder holds. A remote folder is not listed: it may hold a million objects."""
    if not is_local(folder):
        return
    path = folder.removeprefix("file://")
    there = {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith(".tar")}
    listed = dict(zip(manifest.names, manifest.sizes.tolist(), strict=True))
    for name in sorted(there.keys() | listed.keys()):
        if there.get(name) != listed.get(name):
            what = "is gone" if name not in there else "is new" if name not in listed else "has another size"
            raise DataError(
                f"{folder}: {name} {what} since the manifest was written; run `unlabeled shards index {folder}` again"
            )


class _Indexed:
    """A manifest with its index: in memory-mapped form where it is local or small, else read by range."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, fetcher: Fetcher):
        self.manifest, self.rows, self.fetcher = manifest, rows, fetcher
        self._first = np.concatenate([[0], np.cumsum(manifest.counts)])
        self._mapped: np.ndarray | None = None
        self._lock = threading.Lock()

    def records(self, shard: int, row: int, count: int) -> np.ndarray:
        """[count, extensions] of consecutive samples of a shard."""
        width = len(self.manifest.extensions)
        begin = int(self._first[shard]) + row
        total = int(self._first[-1]) * width * RECORD.itemsize
        with self._lock:
            if self._mapped is None and (is_local(self.manifest.index) or total <= COPIED_INDEX):
                self._mapped = np.asarray(_map(self.manifest, total, self.fetcher)).reshape(-1, width)
        if self._mapped is not None:
            return self._mapped[begin : begin + count]
        size = width * RECORD.itemsize
        data = self.fetcher.range(self.manifest.index, begin * size, (begin + count) * size)
        if len(data) != count * size:
            raise DataError(f"{self.manifest.index}: is cut short; run `unlabeled shards index` again")
        return np.frombuffer(data, RECORD).reshape(count, width)


def _map(manifest: Manifest, size: int, fetcher: Fetcher) -> np.ndarray:
    """The whole index in memory-mapped form; a remote one is copied into the cache folder first, and checked."""
    url = manifest.index
    local = is_local(url)
    path = Path(url.removeprefix("file://")) if local else cache_folder("index") / f"{manifest.index_hash}.bin"
    if not local and not path.is_file():
        write_whole(str(path), _whole(manifest, size, fetcher))
    try:
        if path.stat().st_size == size:
            return np.memmap(path, RECORD, "r") if size else np.zeros(0, RECORD)
        raise DataError(
            f"{url}: holds {path.stat().st_size} bytes instead of {size}; run `unlabeled shards index` again"
        )
    except FileNotFoundError:
        raise DataError(f"{url}: no such file; run `unlabeled shards index` again") from None


def _whole(manifest: Manifest, size: int, fetcher: Fetcher) -> list[bytes]:
    """The index in parts; asked for again where its hash is wrong, as that may be of the way."""
    for _ in range(LOOKS):
        parts = [fetcher.range(manifest.index, at, min(size, at + PART)) for at in range(0, size, PART)]
        if xxhash.xxh3_128_hexdigest(b"".join(parts)) == manifest.index_hash:
            return parts
    raise DataError(
        f"{manifest.index}: is not the file that the manifest was written with; run `unlabeled shards index` again"
    )
