"""A cache of byte ranges on a local disk, so that a second epoch or a restart does not read them from the store again.

It consists of plain files `<folder>/<dataset>/<first sample>-<number of samples>`, each with the bytes of consecutive
samples of one shard. A file is written under a temporary name and renamed. The hash of each sample is checked when it
is used, so the only cost of a damaged file is one more request. The cache deletes only files that it wrote, in its own
folder. When the folder is full, the file that the plan needs last is deleted first.
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
SUBFOLDER = "unlabeled-cache"  # in the user's folder; the cache deletes nothing outside of it


class Cache:
    """A cache of at most `limit` bytes in a sub-folder of `folder`/unlabeled-cache.

    Each process locks a sub-folder for itself. After the process ends, another one can lock and use it.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.limit, self.used, self._warned = limit, 0, False
        self._lock = threading.Lock()
        # A file is identified by (dataset, number of its first sample). For each dataset: the first samples of its
        # files in order, and {first sample: number of samples}.
        self._files: dict[str, tuple[list[int], dict[int, int]]] = {}
        self._next_use: dict[tuple[str, int], int] = {}
        self._by_next_use: list[tuple[int, str, int]] = []  # heap of (−next use, dataset, first sample)
        self._sizes: dict[tuple[str, int], int] = {}  # bytes
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
            if _UNFINISHED.match(path.name):  # left by a process that was killed
                path.unlink()
            elif match := _NAME.match(path.name):
                self._add(path.parent.name, int(match[1]), int(match[2]), path.stat().st_size, 0)
        self._make_room(0)

    def covers(self, dataset: str, first: int, count: int) -> list[tuple[int, int]]:
        """[(first sample of a file, number of its samples)] of the files that together hold [first, first + count);
        empty if some samples are missing.
        """
        with self._lock:
            firsts, counts = self._files.get(dataset, ([], {}))
            out, sample = [], first  # the first sample that is not covered yet
            while sample < first + count:
                position = bisect.bisect_right(firsts, sample) - 1
                file_first = firsts[position] if position >= 0 else 0
                file_end = file_first + counts.get(file_first, 0)
                if file_end <= sample:
                    return []
                out.append((file_first, counts[file_first]))
                sample = file_end
            return out

    def read(self, dataset: str, first: int, count: int) -> bytes | None:
        """The bytes of a file; None if it does not exist any more."""
        try:
            return (self.folder / dataset / f"{first}-{count}").read_bytes()
        except OSError:
            return None

    def write(self, dataset: str, first: int, count: int, data: bytes, next_use: int) -> None:
        """Store a range that is needed next at place `next_use`, if there is room, or if files that are needed later
        can be deleted for it.

        A disk that is full or read-only is reported once, without an error.
        """
        if len(data) > self.limit:
            return
        with self._lock:
            if (dataset, first) in self._sizes:
                return
            if not self._make_room(len(data), next_use):
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
                else:  # deleted in the meantime, to make room for another range
                    temporary.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.drop(dataset, first)
            self._warn(error)

    def set_next_use(self, dataset: str, first: int, next_use: int) -> None:
        """Set the place at which a file, which has just been read, is needed next."""
        with self._lock:
            if (dataset, first) in self._sizes:
                self._next_use[dataset, first] = next_use
                heapq.heappush(self._by_next_use, (-next_use, dataset, first))

    def drop(self, dataset: str, first: int) -> None:
        """Delete one file."""
        with self._lock:
            self._remove(dataset, first)

    def _add(self, dataset: str, first: int, count: int, size: int, next_use: int) -> None:
        firsts, counts = self._files.setdefault(dataset, ([], {}))
        bisect.insort(firsts, first)
        counts[first] = count
        self._sizes[dataset, first], self._next_use[dataset, first] = size, next_use
        self.used += size
        heapq.heappush(self._by_next_use, (-next_use, dataset, first))

    def _remove(self, dataset: str, first: int) -> None:
        size = self._sizes.pop((dataset, first), None)
        if size is None:
            return
        firsts, counts = self._files[dataset]
        del firsts[bisect.bisect_left(firsts, first)], self._next_use[dataset, first]
        with contextlib.suppress(OSError):  # the disk may have become read-only
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

    def _make_room(self, size: int, next_use: int | None = None) -> bool:
        """Delete files until `size` bytes fit, those first that are needed last. Returns False if only files that are
        needed before `next_use` are left."""
        while self.used + size > self.limit and self._by_next_use:
            negative_use, dataset, first = self._by_next_use[0]
            last_needed = -negative_use
            # An outdated entry: the file has been read since, or deleted.
            if self._next_use.get((dataset, first)) != last_needed:
                heapq.heappop(self._by_next_use)
                continue
            if next_use is not None and last_needed <= next_use:
                return False
            heapq.heappop(self._by_next_use)
            self._remove(dataset, first)
        return self.used + size <= self.limit


def _lock_folder(root: Path) -> tuple[Path, int]:
    """(the first of root/0, root/1, … that no other process has locked, the descriptor that holds our lock on it).

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
