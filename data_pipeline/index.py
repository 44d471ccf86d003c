"""The index of a shard set: what every shard holds, found by one pass over its bytes, so that any sample can be read by range and checked.

Two files lie beside the shards. `manifest.json` is small: the shards with bytes, samples and hash, the extensions, the class names.
`index-ID.bin` has 20 bytes per sample and extension: offset u64, size u32, xxh3-64 u64; absent members have offset 0. It is read by range.
Shards that have no manifest (made elsewhere, or not ours to write beside) are indexed into the cache folder when they are first read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.decode import IMAGES
from data_pipeline.fetch import Missing, patiently
from data_pipeline.storage import DataError, cache_folder, is_local, open_store, stamp, write_whole
from pretrain.errors import command
from pretrain.progress import Progress

VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
MEMBERS = (
    *IMAGES,
    "npy",
    *VIDEOS,
    "cls",
    "json",
    "txt",
    "docs",
    "tokens",
)  # what a sample may hold; other members are left unread
MAX_MEMBER_BYTES = 256 << 20
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("hash", "<u8")])  # of one member, inside the tar
FORMAT = 1
MANIFEST = "manifest.json"
MEMBER_NAME = re.compile(
    r"^((?:.*/|)[^.]+)[.]([^/]*)$"
)  # key and extension, as webdataset splits them: at the first dot


# ---------------------------------------------------------------- one shard
@dataclass
class Shard:
    """What one tar holds: `records` [samples, extensions]; `problems` are members that were left out, and why."""

    url: str
    bytes: int = 0
    hash: str = ""  # xxh3-128 of the whole file
    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    records: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), RECORD))
    problems: list[str] = field(default_factory=list)


class _Hashed(io.RawIOBase):
    """A file that is read once from front to back; hashes what passes and remembers whether it ended in zeros."""

    def __init__(self, file: Any):
        self.file, self.hash, self.count, self.ends_in_zeros = file, xxhash.xxh3_128(), 0, False

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if data:
            self.hash.update(data)
            self.count += len(data)
            self.ends_in_zeros = len(data) >= 512 and not any(data[-512:])
        return data


def scan(url: str) -> Shard:
    """One pass over a tar. An error where the file is no tar, or was cut off; duplicate keys and oversized members go to `problems`."""
    fs, path = open_store(url)
    shard = Shard(url)
    samples: list[dict[str, tuple[int, int, int]]] = []
    seen: set[str] = set()
    try:
        with fs.open(path, "rb", **({} if is_local(url) else {"cache_type": "readahead"})) as raw:
            file = _Hashed(raw)
            with tarfile.open(fileobj=file, mode="r|", bufsize=1 << 16) as tar:  # type: ignore[call-overload]
                for member in tar:
                    _take(tar, member, shard, samples, seen)
            while file.read(1 << 20):
                pass
            if not file.ends_in_zeros:
                raise tarfile.ReadError("the end-of-archive mark is missing")
            shard.bytes, shard.hash = file.count, file.hash.hexdigest()
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{url}: is no whole tar file ({error}); fetch or build it again, or leave it out") from None
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror or error})") from None
    shard.extensions = [e for e in MEMBERS if any(e in members for members in samples)]
    shard.records = np.zeros((len(samples), len(shard.extensions)), RECORD)
    for row, members in zip(shard.records, samples, strict=True):
        for extension, record in members.items():
            row[shard.extensions.index(extension)] = record
    return shard


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Shard, samples: list[dict], seen: set[str]) -> None:
    """Add one member of the tar to the last sample, or begin the next."""
    match = MEMBER_NAME.match(member.name)
    if not member.isreg() or match is None or (extension := match[2].lower()) not in MEMBERS:
        return
    key = match[1]
    if member.size > MAX_MEMBER_BYTES:
        shard.problems.append(f"{member.name}: {member.size} bytes, but {MAX_MEMBER_BYTES} are allowed; left out")
        return
    if not shard.keys or shard.keys[-1] != key:
        if key in seen:
            shard.problems.append(f"{member.name}: the key {key} stands in the shard twice; left out")
            return
        seen.add(key)
        shard.keys.append(key)
        samples.append({})
    if extension in samples[-1]:
        shard.problems.append(f"{member.name}: stands in the sample twice; the first is taken")
        return
    data = tar.extractfile(member)
    content = data.read() if data else b""
    samples[-1][extension] = (member.offset_data, member.size, xxhash.xxh3_64_intdigest(content))


# ---------------------------------------------------------------- a set of shards
@dataclass
class Manifest:
    """A shard set: S shards by name, inside `folder` (names are whole URLs where `folder` is empty)."""

    folder: str
    names: list[str]
    sizes: np.ndarray  # int64 [S], bytes
    counts: np.ndarray  # int64 [S], samples
    hashes: list[str]  # xxh3-128 of each shard
    extensions: list[str]
    about: dict[str, Any]  # what else the file says: classes, source, …
    index: str  # URL of the index file
    index_hash: str  # xxh3-128 of it
    id: str

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def total_bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def classes(self) -> list[str]:
        return self.about.get("classes", [])

    def url(self, shard: int) -> str:
        return f"{self.folder}/{self.names[shard]}" if self.folder else self.names[shard]

    def first_difference(self, other: Manifest) -> str:
        """In words, how `other` differs; "" where both hold the same shards."""
        mine, theirs = (
            {n: (int(b), int(c), h) for n, b, c, h in zip(m.names, m.sizes, m.counts, m.hashes, strict=True)}
            for m in (self, other)
        )
        for name, what in mine.items():
            if name not in theirs:
                return f"{name} is not there any more ({len(mine)} shards then, {len(theirs)} now)"
            if theirs[name] != what:
                then, now = (f"{samples} samples in {size} bytes" for size, samples, _ in (what, theirs[name]))
                return f"{name} had {then}, now {now}" if then != now else f"the bytes of {name} have changed"
        for name in theirs:
            if name not in mine:
                return f"{name} is new ({len(mine)} shards then, {len(theirs)} now)"
        return "" if self.names == other.names else "the shards stand in another order"


def dataset_id(names: Iterable[str], sizes: Iterable[int], counts: Iterable[int], hashes: Iterable[str]) -> str:
    """A hash of what the order of samples depends on, and of every byte; the same wherever the set lies."""
    out = xxhash.xxh3_128()
    for name, size, count, digest in zip(names, sizes, counts, hashes, strict=True):
        out.update(f"{name.rpartition('/')[2]}\0{size}\0{count}\0{digest}\n".encode())
    return out.hexdigest()


def parse(text: str | bytes, folder: str, source: str) -> Manifest:
    """A manifest from the content of its file; `source` leads the error."""
    try:
        content = json.loads(text)
        version = content.pop("format")
        if version != FORMAT:
            raise DataError(
                f"{source}: has format {version}, but this version reads {FORMAT}; run `unlabeled shards index` again"
            )
        rows = content.pop("shards")
        names, sizes, counts, hashes = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
        return Manifest(
            folder,
            names,
            np.array(sizes, np.int64),
            np.array(counts, np.int64),
            hashes,
            content.pop("extensions"),
            {k: v for k, v in content.items() if k not in ("columns", "samples", "bytes", "dataset")},
            f"{folder}/{content.pop('index')}",
            content.pop("index_hash"),
            content["dataset"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source}: is no shard manifest ({error!r}); run `unlabeled shards index` again") from None


def render(manifest: Manifest) -> str:
    """The content of manifest.json, a line per shard."""
    head = {
        "format": FORMAT,
        "dataset": manifest.id,
        "samples": manifest.samples,
        "bytes": manifest.total_bytes,
        "extensions": manifest.extensions,
        "index": manifest.index.rpartition("/")[2],
        "index_hash": manifest.index_hash,
        **manifest.about,
        "columns": ["name", "bytes", "samples", "xxh3-128"],
    }
    lines = [json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "shards": [']
    rows = zip(manifest.names, manifest.sizes.tolist(), manifest.counts.tolist(), manifest.hashes, strict=True)
    lines.append(",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows))
    return "\n".join(lines) + "\n ]\n}\n"


# ---------------------------------------------------------------- building it
def write(
    folder: str | Path,
    say: Callable[[str], None] = print,
    extra: dict[str, Any] | None = None,
    workers: int | None = None,
) -> Manifest:
    """Index all shards of a folder (local or any fsspec URL) in parallel, and write index and manifest beside them.

    `extra` lands in the manifest. Shards that a stopped call has scanned are not scanned again. What a shard's scan leaves out is said.
    """
    folder = str(folder).rstrip("/")
    fs, path = open_store(folder)
    found = sorted(fs.glob(path + "/*.tar"))
    if not found:
        raise DataError(f"{folder}: holds no .tar shards")
    urls = [fs.unstrip_protocol(f) if "://" in folder else f for f in found]
    about: dict[str, Any] = {}
    with contextlib.suppress(DataError):  # a manifest that cannot be read is what this call mends
        old = load(folder)
        about = old.about if old else {}
    about = {**about, **(extra or {})}
    about.setdefault("source", "tars made elsewhere")
    return _build(urls, folder, folder, about, say, workers)


def in_cache(urls: list[str], say: Callable[[str], None] = print) -> Manifest:
    """The index of shards without a manifest, in the cache folder; made when these files, unchanged, are seen for the first time."""
    key = hashlib.sha256("\n".join(f"{url} {stamp(url)}" for url in urls).encode()).hexdigest()[:24]
    folder = str(cache_folder("index") / key)
    held = load(folder)
    if held is None:
        say(
            f"indexing {len(urls)} shards that have no manifest, once; `unlabeled shards index FOLDER` stores it beside them"
        )
        held = _build(urls, "", folder, {"source": "indexed when first read"}, say, None)
    held.folder = ""
    return held


def _build(
    urls: list[str], folder: str, target: str, about: dict, say: Callable[[str], None], workers: int | None
) -> Manifest:
    parts = cache_folder("scans")
    files = [parts / (hashlib.sha256(f"{url} {stamp(url)}".encode()).hexdigest()[:32] + ".npz") for url in urls]
    _scan_all(urls, files, workers)
    heads = [_read_part(file)[0] for file in files]
    extensions = [e for e in MEMBERS if any(e in head["extensions"] for head in heads)]
    names = [url.rpartition("/")[2] if folder else url for url in urls]
    sizes, counts, hashes = ([head[k] for head in heads] for k in ("bytes", "samples", "hash"))
    identity = dataset_id(names, sizes, counts, hashes)
    index = f"index-{identity[:12]}.bin"
    for url, head in zip(urls, heads, strict=True):
        for problem in head["problems"][:20]:
            say(f"{url}: {problem}")
        if len(head["problems"]) > 20:
            say(f"{url}: … and {len(head['problems']) - 20} more")

    digest = xxhash.xxh3_128()

    def records() -> Iterable[bytes]:
        for file in files:
            head, rows = _read_part(file)
            whole = np.zeros((len(rows), len(extensions)), RECORD)
            for column, extension in enumerate(head["extensions"]):
                whole[:, extensions.index(extension)] = rows[:, column]
            digest.update(whole.tobytes())
            yield whole.tobytes()

    write_whole(f"{target}/{index}", records())
    manifest = Manifest(
        folder,
        names,
        np.array(sizes, np.int64),
        np.array(counts, np.int64),
        hashes,
        extensions,
        about,
        f"{target}/{index}",
        digest.hexdigest(),
        identity,
    )
    write_whole(f"{target}/{MANIFEST}", [render(manifest).encode()])
    _remove_others(target, index)
    for file in files:
        file.unlink(missing_ok=True)
    return manifest


def _remove_others(target: str, index: str) -> None:
    fs, path = open_store(target)
    for other in fs.glob(path + "/index-*.bin"):
        if not other.endswith("/" + index):
            fs.rm_file(other)


def _scan_all(urls: list[str], files: list[Path], workers: int | None) -> None:
    """Scan shards in processes of their own (plain commands: no fork, no pickle); each leaves its parts as files."""
    todo = [(url, file) for url, file in zip(urls, files, strict=True) if not file.is_file()]
    count = min(workers or os.cpu_count() or 1, len(todo))
    if count <= 1:
        for url, file in todo:
            _scan_to_file(url, file)
        return

    def run(lines: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data_pipeline.index"]
        return subprocess.run(command, input=lines, capture_output=True, text=True)

    progress = Progress("index", len(urls), len(urls) - len(todo))
    shares = ["".join(json.dumps([url, str(file)]) + "\n" for url, file in todo[n::count]) for n in range(count)]
    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(run, lines) for lines in shares]
        while (done := sum(file.is_file() for file in files)) < len(files) and not all(run.done() for run in runs):
            progress.update(done, "shards")
            time.sleep(0.05)
    progress.update(sum(file.is_file() for file in files), "shards")
    progress.close()
    for ended in (run.result() for run in runs):
        if ended.returncode:
            raise DataError((ended.stderr.strip().splitlines() or ["a scan was killed"])[-1].removeprefix("error: "))


def _scan_to_file(url: str, file: Path) -> None:
    shard = scan(url)
    head = {"bytes": shard.bytes, "samples": len(shard.keys), "hash": shard.hash}
    head |= {"extensions": shard.extensions, "problems": shard.problems}
    temporary = Path(f"{file}.{os.getpid()}")
    with temporary.open("wb") as out:
        np.savez(out, head=np.frombuffer(json.dumps(head).encode(), np.uint8), records=shard.records)
    temporary.replace(file)


def _scan_all_of_stdin() -> None:
    """The scanning process: lines of [url, file] come in."""
    for line in sys.stdin:
        url, file = json.loads(line)
        _scan_to_file(url, Path(file))


def _read_part(file: Path) -> tuple[dict[str, Any], np.ndarray]:
    with np.load(file, allow_pickle=False) as part:
        return json.loads(part["head"].tobytes()), part["records"]


# ---------------------------------------------------------------- reading and checking it
def load(folder: str) -> Manifest | None:
    """The manifest in a folder, None where there is none."""
    folder = folder.rstrip("/")
    fs, path = open_store(folder)
    where = f"{folder}/{MANIFEST}"
    try:
        text = patiently(where, lambda: fs.cat_file(f"{path.rstrip('/')}/{MANIFEST}"))
    except Missing:
        return None
    return parse(text, folder, where)


def verify(folder: str | Path, say: Callable[[str], None] = print) -> list[str]:
    """Read every shard anew and compare each byte with what the index says; the differences, in words. None: all is well."""
    folder = str(folder).rstrip("/")
    held = load(folder)
    if held is None:
        raise DataError(f"{folder}: has no {MANIFEST}; make it with `unlabeled shards index {folder}`")
    fs, path = open_store(held.index)
    records = np.frombuffer(patiently(held.index, lambda: fs.cat_file(path)), RECORD)
    if records.size != held.samples * len(held.extensions):
        return [f"{held.index}: holds {records.size} records instead of {held.samples * len(held.extensions)}"]
    records, first, problems = records.reshape(held.samples, -1), 0, []
    progress = Progress("verify", len(held.names))
    for number in range(len(held.names)):
        last = first + int(held.counts[number])
        problems += [f"{held.url(number)}: {p}" for p in _verify_shard(held, number, records[first:last])]
        first = last
        progress.update(number + 1, f"{len(problems)} problems")
    progress.close()
    fs, path = open_store(folder)
    known = set(held.names)
    problems += [f"{f}: is not in the manifest" for f in fs.glob(path + "/*.tar") if f.rpartition("/")[2] not in known]
    return problems


def _verify_shard(held: Manifest, number: int, expected: np.ndarray) -> list[str]:
    try:
        shard = scan(held.url(number))
    except DataError as error:
        return [str(error).partition(": ")[2]]
    if shard.hash == held.hashes[number]:
        return []
    if len(shard.keys) != len(expected):
        return [f"holds {len(shard.keys)} samples instead of {len(expected)}"]
    out = []
    for column, extension in enumerate(held.extensions):
        if extension in shard.extensions:
            found = shard.records[:, shard.extensions.index(extension)]
        else:
            found = np.zeros(len(expected), RECORD)
        wrong = np.flatnonzero(found != expected[:, column])
        out += [f"{shard.keys[i]}.{extension} differs from what was indexed" for i in wrong]
    return out or [f"{shard.bytes} bytes, {held.sizes[number]} when indexed: differs outside of the samples"]


if __name__ == "__main__":
    sys.exit(command(_scan_all_of_stdin))
