"""A cache of byte ranges on a local disk, so that a second epoch or a restart does not read them from the store again.

It consists of plain files `<folder>/<dataset id>/<first sample>-<samples>`, each with the bytes of consecutive samples
of one shard. A file is written under a temporary name and renamed. The hash of each sample is checked when it is used,
so a damaged file costs one request and nothing else. The cache deletes only files that it wrote, in its own folder.
When the folder is full, the file that the plan needs last is deleted first.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import heapq
import os
import re
import sys
import threading
from pathlib import Path

from common.errors import DataError
from common.output import say

_NAME = re.compile(r"^(\d+)-(\d+)$")
_UNFINISHED = re.compile(r"^\d+-\d+\.\d+\.partial$")
SUBFOLDER = "unlabeled-cache"  # of the user's folder; the cache deletes nothing outside of it


class Cache:
    """At most `limit` bytes below `folder`/unlabeled-cache.

    Each process locks a sub-folder; after its end another process takes that over.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.limit, self.used, self._warned = limit, 0, False
        self._lock = threading.Lock()
        self._sets: dict[str, tuple[list[int], dict[int, int]]] = {}  # dataset -> (firsts in order, {first: samples})
        self._by_next_use: list[tuple[int, str, int]] = []  # heap of (− next use, dataset, first)
        self._next_use: dict[tuple[str, int], int] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        try:
            self.folder, self._lock_fd = _lock_folder(Path(folder) / SUBFOLDER)
            self._load_files()
        except OSError as error:
            raise DataError(
                f"data.fetch.cache = {str(folder)!r}: cannot be used ({error.strerror or error}); name a folder on a"
                " local disk"
            ) from None

    def _load_files(self) -> None:
        """Register the files that an earlier process wrote."""
        for path in sorted(self.folder.glob("*/*")):
            if _UNFINISHED.match(path.name):  # of a process that was killed
                path.unlink()
            elif match := _NAME.match(path.name):
                self._add(path.parent.name, int(match[1]), int(match[2]), path.stat().st_size, 0)
        self._shrink(0)

    def covers(self, dataset: str, first: int, count: int) -> list[tuple[int, int]]:
        """[(first sample of a file, number of its samples)] of the files that together hold [first, first + count);
        empty if some samples are missing.
        """
        with self._lock:
            firsts, counts = self._sets.get(dataset, ([], {}))
            out, at = [], first
            while at < first + count:
                place = bisect.bisect_right(firsts, at) - 1
                if place < 0 or firsts[place] + counts[firsts[place]] <= at:
                    return []
                out.append((firsts[place], counts[firsts[place]]))
                at = firsts[place] + counts[firsts[place]]
            return out

    def read(self, dataset: str, first: int, count: int) -> bytes | None:
        """The bytes of a file; None if it does not exist any more."""
        try:
            return (self.folder / dataset / f"{first}-{count}").read_bytes()
        except OSError:
            return None

    def write(self, dataset: str, first: int, count: int, data: bytes, next_use: int) -> None:
        """Store a range that is needed next at place `next_use`, if there is room or a file that is needed later.

        A disk that is full or read-only is reported once, without an error.
        """
        if len(data) > self.limit:
            return
        with self._lock:
            if first in self._sets.get(dataset, ([], {}))[1]:
                return
            if not self._shrink(len(data), next_use):
                return
            self._add(dataset, first, count, len(data), next_use)
        path = self.folder / dataset / f"{first}-{count}"
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            with self._lock:
                if (dataset, first) in self._sizes:
                    temporary.replace(path)
                else:  # deleted meanwhile, for another range
                    temporary.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.drop(dataset, first)
            self._warn(error)

    def set_next_use(self, dataset: str, first: int, next_use: int) -> None:
        """Note that a file, which has just been read, is needed next at place `next_use`."""
        with self._lock:
            if (dataset, first) in self._sizes:
                self._next_use[dataset, first] = next_use
                heapq.heappush(self._by_next_use, (-next_use, dataset, first))

    def drop(self, dataset: str, first: int) -> None:
        """Forget and delete one file."""
        with self._lock:
            self._remove(dataset, first)

    def _add(self, dataset: str, first: int, count: int, size: int, next_use: int) -> None:
        firsts, counts = self._sets.setdefault(dataset, ([], {}))
        bisect.insort(firsts, first)
        counts[first] = count
        self._sizes[dataset, first], self._next_use[dataset, first] = size, next_use
        self.used += size
        heapq.heappush(self._by_next_use, (-next_use, dataset, first))

    def _remove(self, dataset: str, first: int) -> None:
        size = self._sizes.pop((dataset, first), None)
        if size is None:
            return
        firsts, counts = self._sets[dataset]
        del firsts[bisect.bisect_left(firsts, first)], self._next_use[dataset, first]
        with contextlib.suppress(OSError):  # a disk that turned read-only
            (self.folder / dataset / f"{first}-{counts.pop(first)}").unlink(missing_ok=True)
        self.used -= size

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            say(
                f"data.fetch.cache: {self.folder} cannot be written ({error.strerror}); ranges that are not in it are"
                " read from the store",
                file=sys.stderr,
            )

    def _shrink(self, room: int, next_use: int | None = None) -> bool:
        """Free `room` bytes. False if all files are needed before `next_use`."""
        while self.used + room > self.limit and self._by_next_use:
            when, dataset, first = self._by_next_use[0]
            if self._next_use.get((dataset, first)) != -when:  # an outdated entry: read again since, or deleted
                heapq.heappop(self._by_next_use)
                continue
            if next_use is not None and -when <= next_use:
                return False
            heapq.heappop(self._by_next_use)
            self._remove(dataset, first)
        return self.used + room <= self.limit


def _lock_folder(root: Path) -> tuple[Path, int]:
    """(the first of root/0, root/1, … that no other process has locked, the descriptor of our lock on it).

    The kernel releases the lock when the process ends.
    """
    number = 0
    while True:
        folder = root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, descriptor
        except BlockingIOError:
            os.close(descriptor)
            number += 1
