"""Scan a tar: find the position and the hash of every member, in one pass over the file.

`scan` returns the result. The command `python -m data_pipeline.shards.tar_scan` scans the tars that are listed on
standard input, and writes each result to a file; `index.py` starts one such process per core.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common.errors import DataError, run_main
from common.untrusted import open_binary, open_tar, tar_members
from data_pipeline.shards.members import (
    MAX_MEMBER_BYTES,
    MEMBER_NAME,
    SEVERAL_DOTS,
    LeftOut,
    in_order,
    is_indexed,
    member_extensions,
    reason_not_indexed,
)
from data_pipeline.storage.urls import is_local, open_store

MAX_FOLDERS = 1000  # of a set that are taken for class folders
RECORD = np.dtype([("offset", "<u8"), ("size", "<u4"), ("hash", "<u8")])  # the index record of one member


@dataclass
class Shard:
    """The content of one tar. `problems` and `left` describe members that were left out, and why."""

    url: str
    bytes: int = 0
    hash: str = ""  # xxh3-128 of the whole file
    keys: list[str] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    records: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), RECORD))  # [samples, extensions]
    problems: list[str] = field(default_factory=list)
    left: LeftOut = field(default_factory=LeftOut)

    @property
    def folders(self) -> list[str]:
        """The folders that the samples lie in, at most MAX_FOLDERS + 1 of them."""
        found = dict.fromkeys(key.rpartition("/")[0] for key in self.keys)
        return list(found)[: MAX_FOLDERS + 1]


class _HashedFile(io.RawIOBase):
    """A file that is read once from the beginning to the end. Computes the hash of its bytes, and whether the last 512
    bytes that were read are zeros."""

    def __init__(self, file: Any):
        self.file, self.hash, self.count, self.ends_in_zeros = file, xxhash.xxh3_128(), 0, False

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if data:
            self.hash.update(data)
            self.count += len(data)
            self.ends_in_zeros = len(data) >= 512 and not any(data[-512:])
        return data


def scan(url: str, further: Sequence[str] = ()) -> Shard:
    """Index a tar in one pass. Raises DataError for a file that is not a tar, or is truncated.

    Members with the extensions `further` are indexed in addition to those with `INDEXED_EXTENSIONS`. Duplicate keys and
    oversized members go to `problems`.
    """
    fs, path = open_store(url)
    shard = Shard(url)
    samples = _SampleCollector(shard, further)
    try:
        with open_binary(path) if is_local(url) else fs.open(path, "rb", cache_type="readahead") as raw:
            file = _HashedFile(raw)
            with open_tar(file, "r|", bufsize=1 << 16) as tar:  # type: ignore[arg-type]
                for member in tar_members(tar):
                    samples.add(tar, member)
            samples.finish()
            while file.read(1 << 20):
                pass
            if not file.ends_in_zeros:
                raise tarfile.ReadError("the end-of-archive mark is missing")
            shard.bytes, shard.hash = file.count, file.hash.hexdigest()
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{url}: is not a complete tar file ({error}); fetch or build it again, or leave it out"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror or error})") from None
    shard.extensions = in_order({extension for members in samples.done for extension in members})
    shard.records = np.zeros((len(samples.done), len(shard.extensions)), RECORD)
    for row, members in zip(shard.records, samples.done, strict=True):
        for extension, record in members.items():
            row[shard.extensions.index(extension)] = record
    return shard


class _SampleCollector:
    """Collects consecutive members of a tar into samples. `done` holds the records of the samples that are complete."""

    def __init__(self, shard: Shard, further: Sequence[str]):
        self.shard, self.further = shard, further
        self.done: list[dict[str, tuple[int, int, int]]] = []
        self.key, self.waiting = "", list[tuple[str, str, tuple[int, int, int]]]()  # (name, ending, record)
        self.keys: set[str] = set()  # of the samples in `done`

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Add one member to the current sample, or begin the next sample if its key differs."""
        if member.isdir():
            return
        match = MEMBER_NAME.match(member.name)  # (key, ending)
        ending = match[2].lower() if match else ""
        if not member.isreg():
            return self.shard.left.add("a link or a special file", member.name)
        if match is None or not is_indexed(ending, self.further):
            return self.shard.left.add(reason_not_indexed(ending), member.name)
        if member.issparse():
            self.shard.problems.append(f"{member.name}: is a sparse file, which is not read; left out")
            return None
        if member.size > MAX_MEMBER_BYTES:
            size = f"holds {member.size} bytes, but at most {MAX_MEMBER_BYTES} are allowed"
            self.shard.problems.append(f"{member.name}: {size}; left out")
            return None
        if match[1] != self.key:
            self.finish()
            self.key = match[1]
        data = tar.extractfile(member)
        content = data.read() if data else b""
        record = (member.offset_data, member.size, xxhash.xxh3_64_intdigest(content))
        self.waiting.append((member.name, ending, record))
        return None

    def finish(self) -> None:
        """Append the current sample to `done`, unless it has no members or its key is not new."""
        members: dict[str, tuple[int, int, int]] = {}
        key_occurs_again = self.key in self.keys
        extensions = member_extensions((ending for _, ending, _ in self.waiting), self.further)
        for (name, _, record), extension in zip(self.waiting, extensions, strict=True):
            if not extension:
                self.shard.left.add(SEVERAL_DOTS, name)
            elif key_occurs_again:
                self.shard.problems.append(f"{name}: the key {self.key} occurs twice in the shard; left out")
            elif extension in members:
                self.shard.problems.append(f"{name}: occurs twice in the sample; the first one is used")
            else:
                members[extension] = record
        if members:
            self.keys.add(self.key)
            self.shard.keys.append(self.key)
            self.done.append(members)
        self.waiting = []


# ---------------------------------------------------------------- scan files, which other processes write
def scan_to_file(url: str, file: Path, further: Sequence[str] = ()) -> None:
    """Scan a tar, and write the result to `file` atomically."""
    shard = scan(url, further)
    head = {"bytes": shard.bytes, "samples": len(shard.keys), "hash": shard.hash}
    head |= {"extensions": shard.extensions, "problems": shard.problems, "left": shard.left, "folders": shard.folders}
    temporary = Path(f"{file}.{os.getpid()}")
    with temporary.open("wb") as out:
        np.savez(out, head=np.frombuffer(json.dumps(head).encode(), np.uint8), records=shard.records)
    temporary.replace(file)


def _scan_tars_from_stdin() -> None:
    """The main function of a scanning process, which reads lines of [url, file, further] from standard input."""
    for line in sys.stdin:
        url, file, further = json.loads(line)
        scan_to_file(url, Path(file), further)


def read_scan(url: str, file: Path, further: Sequence[str] = ()) -> tuple[dict[str, Any], np.ndarray]:
    """(the facts about a shard, its records [samples, extensions]), from a file that `scan_to_file` wrote.

    If the file does not exist any more, the shard is scanned again: a process that indexes the same shard as part of
    another set deletes the scan files of its set at the end.
    """
    while True:
        try:
            with np.load(file, allow_pickle=False) as part:
                return json.loads(part["head"].tobytes()), part["records"]
        except FileNotFoundError:
            scan_to_file(url, file, further)


if __name__ == "__main__":
    sys.exit(run_main(_scan_tars_from_stdin))
