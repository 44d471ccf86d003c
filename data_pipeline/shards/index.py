"""The index of a shard set: the position and the hash of every member, so that any sample can be read by byte range and
verified. It is made in one pass over the shards.

It consists of two files beside the shards; `durations.py` adds a third one for recordings. `manifest.json` is small: it lists the shards with their sizes, numbers of
samples and hashes, the extensions, and the class names. `index-ID.bin` has 20 bytes per sample and extension: offset
u64, size u32, xxh3-64 u64; an absent member has offset 0. It is read by range. Shards without a manifest (made by other
tools, or in a folder that is not writable) are indexed into the cache folder when they are first read.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common import output, process_pool
from common.errors import DataError
from common.progress import Progress
from data_pipeline.shards.manifest import (
    MANIFEST,
    ForeignManifest,
    Manifest,
    dataset_id,
    load_manifest,
    render_manifest,
)
from data_pipeline.shards.members import (
    DOTS_ADVICE,
    SEVERAL_DOTS,
    LeftOut,
    check_extensions,
    in_order,
    no_samples_message,
)
from data_pipeline.shards.tar_scan import MAX_FOLDERS, RECORD, read_scan, scan, scan_to_file
from data_pipeline.storage.ranges import with_retries
from data_pipeline.storage.urls import cache_folder, exclusive, open_store, stamp, write_atomically

MAX_PRINTED_PROBLEMS = 20  # of one shard


def write(
    folder: str | Path,
    say: Callable[[str], None] = output.say,
    extra: dict[str, Any] | None = None,
    workers: int | None = None,
    further: Iterable[str] = (),
) -> Manifest:
    """Index all shards of a folder (local or any fsspec URL) in parallel, and write index and manifest beside them.

    `extra`: entries to add to the manifest. `further`: extensions to index in addition to INDEXED_EXTENSIONS; those of
    an earlier index of the folder are kept. Shards that an interrupted call has scanned are not scanned again. `say` is
    called with one line for each reason why members are left out. Raises DataError, also if the folder holds a
    manifest.json of another program.
    """
    folder = str(folder).rstrip("/")
    fs, path = open_store(folder)
    found = sorted(fs.glob(path + "/*.tar"))
    if not found:
        raise DataError(f"{folder}: holds no .tar shards")
    urls = [fs.unstrip_protocol(f) if "://" in folder else f for f in found]
    try:
        old = load_manifest(folder)
    except ForeignManifest:
        raise
    except DataError:  # a damaged one, which this call replaces
        old = None
    details = {**(old.details if old else {}), **(extra or {})}
    details.setdefault("source", "tars made elsewhere")
    details.pop("left_out", None)
    extensions = check_extensions([*further, *(old.extensions if old else ())])
    return _build(urls, folder, folder, details, extensions, say, workers)


def index_in_cache(urls: list[str], say: Callable[[str], None] = output.say, further: Iterable[str] = ()) -> Manifest:
    """The index of shards without a manifest, with the extensions `further` in addition to INDEXED_EXTENSIONS.

    It is stored in the cache folder, and reused as long as the shards do not change. If several processes call this at
    the same time, such as the ranks of a run, one reads the shards and the others wait for it.
    """
    extensions = check_extensions(further)
    lines = [f"{url} {stamp(url)}" for url in urls]
    key = hashlib.sha256("\n".join([*lines, *extensions]).encode()).hexdigest()[:24]
    cache = cache_folder("index")
    folder = str(cache / key)
    manifest = load_manifest(folder)
    if manifest is None:
        with exclusive(cache / f".{key}.lock"):
            manifest = load_manifest(folder) or _build_in_cache(urls, folder, extensions, say)
    manifest.folder = ""
    return manifest


def _build_in_cache(urls: list[str], folder: str, further: tuple[str, ...], say: Callable[[str], None]) -> Manifest:
    say(
        f"indexing {len(urls)} shards that have no manifest, once; `unlabeled shards index FOLDER` stores the"
        " index beside them"
    )
    return _build(urls, "", folder, {"source": "indexed when first read"}, further, say, None)


def _build(
    urls: list[str],
    folder: str,
    target: str,
    details: dict[str, Any],
    further: tuple[str, ...],
    say: Callable[[str], None],
    workers: int | None,
) -> Manifest:
    """Scan shards and write their index and manifest into `target`. `folder`: the folder that holds all shards,
    or ""."""
    scan_folder = cache_folder("scans")
    versions = [" ".join([url, stamp(url), *further]) for url in urls]
    scan_files = [scan_folder / (hashlib.sha256(text.encode()).hexdigest()[:32] + ".npz") for text in versions]
    _scan_all(urls, scan_files, further, workers)
    heads = [read_scan(*pair, further)[0] for pair in zip(urls, scan_files, strict=True)]
    names = [url.rpartition("/")[2] if folder else url for url in urls]
    sizes, counts, hashes = ([head[k] for head in heads] for k in ("bytes", "samples", "hash"))
    left_out = _report(urls, names, heads, folder or "index", say)
    if folder and not sum(counts):
        raise DataError(f"{folder}: {no_samples_message([dict(left_out)])}")

    extensions = in_order(extension for head in heads for extension in head["extensions"])
    identity = dataset_id(names, sizes, counts, hashes)
    file_key = identity
    if further:  # the index of the same shards has other columns then
        file_key = xxhash.xxh3_128_hexdigest(" ".join([identity, *further]).encode())
    index = f"index-{file_key[:12]}.bin"
    index_hash = xxhash.xxh3_128()
    write_atomically(f"{target}/{index}", _records(urls, scan_files, further, extensions, index_hash))
    manifest = Manifest.of_shards(
        list(zip(names, sizes, counts, hashes, strict=True)),
        extensions,
        {**details, **({"left_out": left_out} if left_out else {})},
        folder=folder,
        index=f"{target}/{index}",
        index_hash=index_hash.hexdigest(),
        id=identity,
    )
    write_atomically(f"{target}/{MANIFEST}", [render_manifest(manifest).encode()])
    _remove_other_indexes(target, index)
    for file in scan_files:
        file.unlink(missing_ok=True)
    return manifest


def _report(
    urls: list[str], names: list[str], heads: list[dict[str, Any]], where: str, say: Callable[[str], None]
) -> LeftOut:
    """Print the problems of all shards. Returns the members that were left out."""
    for url, head in zip(urls, heads, strict=True):
        for problem in head["problems"][:MAX_PRINTED_PROBLEMS]:
            say(f"{url}: {problem}")
        if (hidden := len(head["problems"]) - MAX_PRINTED_PROBLEMS) > 0:
            say(f"{url}: … and {hidden} more")
    left_out = LeftOut()
    for name, head in zip(names, heads, strict=True):
        for reason, (count, example) in head.get("left", {}).items():
            left_out.add(reason, f"{name}/{example}", count)
    for line in left_out.lines():
        say(f"{where}: {line}")
    if SEVERAL_DOTS in left_out:
        say(f"{where}: {DOTS_ADVICE}")
    folders = sorted({name for head in heads for name in head.get("folders", ())} - {"", "."})
    if 1 < len(folders) <= MAX_FOLDERS and not any("cls" in head["extensions"] for head in heads):
        some = ", ".join(folders[:3]) + (", …" if len(folders) > 3 else "")
        say(
            f"{where}: no sample has a .cls member, and so none has a label; if the {len(folders)} folders in the tars"
            f" ({some}) are classes, build shards from them with `unlabeled shards build`, which makes labels of"
            " folders"
        )
    return left_out


def _records(
    urls: list[str], scan_files: list[Path], further: tuple[str, ...], extensions: list[str], digest: xxhash.xxh3_128
) -> Iterator[bytes]:
    """The bytes of the index, shard by shard, with a column for each of `extensions`. Adds them to `digest`."""
    for url, file in zip(urls, scan_files, strict=True):
        head, rows = read_scan(url, file, further)
        columns = np.zeros((len(rows), len(extensions)), RECORD)
        for column, extension in enumerate(head["extensions"]):
            columns[:, extensions.index(extension)] = rows[:, column]
        digest.update(columns.tobytes())
        yield columns.tobytes()


def _remove_other_indexes(target: str, index: str) -> None:
    """Delete all index files of a folder except `index`."""
    fs, path = open_store(target)
    for other in fs.glob(path + "/index-*.bin"):
        name = other.rpartition("/")[2]
        if name != index and re.fullmatch(r"index-[0-9a-f]{12}\.bin", name):
            fs.rm_file(other)


def _scan_all(urls: list[str], scan_files: list[Path], further: tuple[str, ...], workers: int | None) -> None:
    """Scan shards in several processes, which write one file per shard. The processes are started as commands, so that
    nothing is forked or pickled."""
    todo = [(url, file) for url, file in zip(urls, scan_files, strict=True) if not file.is_file()]
    count = min(workers or process_pool.cores(), len(todo))
    if count <= 1:
        for url, file in todo:
            scan_to_file(url, file, further)
        return

    pipe, command = subprocess.PIPE, [sys.executable, "-P", "-m", "data_pipeline.shards.tar_scan"]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]

    def run(process: subprocess.Popen, lines: str) -> tuple[int, str]:
        """Give a process its lines of input, and wait for its end: (exit code, stderr)."""
        error = process.communicate(lines)[1]
        return process.returncode, error

    def scanned() -> int:
        return sum(file.is_file() for file in scan_files)

    progress = Progress("index", len(urls), len(urls) - len(todo))
    inputs = [
        "".join(json.dumps([url, str(file), further]) + "\n" for url, file in todo[n::count]) for n in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(run, *pair) for pair in zip(processes, inputs, strict=True)]
        try:
            while scanned() < len(scan_files) and not all(run.done() for run in runs):
                progress.update(scanned(), "shards")
                time.sleep(0.05)
        except BaseException:  # also KeyboardInterrupt and other requests to stop
            for process in processes:
                process.kill()
            raise
    progress.update(scanned(), "shards")
    progress.close()
    for code, error in (run.result() for run in runs):
        if code:
            raise DataError((error.strip().splitlines() or ["a scan was killed"])[-1].removeprefix("error: "))


# ---------------------------------------------------------------- checking an index
def verify(folder: str | Path, say: Callable[[str], None] = output.say) -> list[str]:
    """Read every shard again and compare it with the index. Returns one line of text for each difference."""
    folder = str(folder).rstrip("/")
    manifest = load_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder}: has no {MANIFEST}; make it with `unlabeled shards index {folder}`")
    fs, path = open_store(manifest.index)
    data = with_retries(manifest.index, lambda: fs.cat_file(path))
    expected_bytes = manifest.samples * len(manifest.extensions) * RECORD.itemsize
    if len(data) != expected_bytes:
        return [f"{manifest.index}: holds {len(data)} bytes instead of {expected_bytes}"]
    records = np.frombuffer(data, RECORD).reshape(manifest.samples, -1)  # [samples, extensions]
    first, problems = 0, []
    progress = Progress("verify", len(manifest.names))
    for number in range(len(manifest.names)):
        last = first + int(manifest.counts[number])
        problems += [f"{manifest.url(number)}: {p}" for p in _verify_shard(manifest, number, records[first:last])]
        first = last
        progress.update(number + 1, f"{len(problems)} problems")
    progress.close()
    fs, path = open_store(folder)
    known = set(manifest.names)
    problems += [f"{f}: is not in the manifest" for f in fs.glob(path + "/*.tar") if f.rpartition("/")[2] not in known]
    return problems


def _verify_shard(manifest: Manifest, number: int, expected: np.ndarray) -> list[str]:
    """The differences between a shard and its records `expected` [samples, extensions] in the index."""
    try:
        shard = scan(manifest.url(number), check_extensions(manifest.extensions))
    except DataError as error:
        return [str(error).partition(": ")[2]]
    if shard.hash == manifest.hashes[number]:
        return []
    if len(shard.keys) != len(expected):
        return [f"holds {len(shard.keys)} samples instead of {len(expected)}"]
    out = []
    for column, extension in enumerate(manifest.extensions):
        if extension in shard.extensions:
            found = shard.records[:, shard.extensions.index(extension)]
        else:
            found = np.zeros(len(expected), RECORD)
        wrong = np.flatnonzero(found != expected[:, column])
        out += [f"{shard.keys[i]}.{extension} differs from what was indexed" for i in wrong]
    return out or [
        f"differs from what was indexed, but not in its samples: {shard.bytes} bytes, {manifest.sizes[number]} when"
        " indexed"
    ]
