"""A cache of byte ranges on local disk, so that a second epoch, or a restart, need not ask the store again.

Plain files `<folder>/<dataset id>/<first sample>-<samples>`: the bytes of consecutive samples of one shard. They are written under another name and
renamed; each sample's hash is checked on use, so a damaged file costs a request and nothing else. Only files that this cache made, in its own
folder, are ever deleted: never a source. When the folder is full, what the plan needs last goes first.
"""

from __future__ import annotations

import bisect
import fcntl
import heapq
import os
import re
import threading
from pathlib import Path

from data_pipeline.storage import DataError

_NAME = re.compile(r"^(\d+)-(\d+)$")
MARK = "unlabeled-cache"  # the folder inside the user's folder; all that is deleted lies below it


class Cache:
    """At most `limit` bytes below `folder`/unlabeled-cache. A process has a sub-folder to itself while it lives; the next one takes it over."""

    def __init__(self, folder: str | Path, limit: int):
        self.limit, self.used = limit, 0
        self._lock = threading.Lock()
        self._sets: dict[str, tuple[list[int], dict[int, int]]] = {}  # dataset -> (firsts in order, {first: samples})
        self._next: list[tuple[int, str, int]] = []  # heap of (− next use, dataset, first)
        self._when: dict[tuple[str, int], int] = {}
        self._size: dict[tuple[str, int], int] = {}
        try:
            self.folder, self._held = _take_folder(Path(folder) / MARK)
            self._find()
        except OSError as error:
            raise DataError(
                f"data.fetch.cache = {str(folder)!r}: cannot be used ({error.strerror or error}); name a folder on a local disk"
            ) from None

    def _find(self) -> None:
        """Take stock of what an earlier process left."""
        for path in sorted(self.folder.glob("*/*")):
            if path.name.endswith(".partial"):  # half written
                path.unlink()
            elif match := _NAME.match(path.name):
                self._add(path.parent.name, int(match[1]), int(match[2]), path.stat().st_size, 0)
        self._shrink(0)

    def covers(self, dataset: str, first: int, count: int) -> list[tuple[int, int]]:
        """[(first sample of a file, its samples)] that together hold [first, first + count); empty where one is missing."""
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
        """The bytes of a file, None where it has gone."""
        try:
            return (self.folder / dataset / f"{first}-{count}").read_bytes()
        except OSError:
            return None

    def write(self, dataset: str, first: int, count: int, data: bytes, next_use: int) -> None:
        """Keep a range whose next use is at step or place `next_use`, if there is room or something that is needed later. A full disk is no error."""
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
                if (dataset, first) in self._size:
                    temporary.replace(path)
                else:  # its place has been given to another since
                    temporary.unlink()
        except OSError:
            temporary.unlink(missing_ok=True)
            self.drop(dataset, first)

    def used_again(self, dataset: str, first: int, next_use: int) -> None:
        """A file has been read; its next use is at `next_use`."""
        with self._lock:
            if (dataset, first) in self._size:
                self._when[dataset, first] = next_use
                heapq.heappush(self._next, (-next_use, dataset, first))

    def drop(self, dataset: str, first: int) -> None:
        """Forget and delete one file."""
        with self._lock:
            self._remove(dataset, first)

    def _add(self, dataset: str, first: int, count: int, size: int, next_use: int) -> None:
        firsts, counts = self._sets.setdefault(dataset, ([], {}))
        bisect.insort(firsts, first)
        counts[first] = count
        self._size[dataset, first], self._when[dataset, first] = size, next_use
        self.used += size
        heapq.heappush(self._next, (-next_use, dataset, first))

    def _remove(self, dataset: str, first: int) -> None:
        size = self._size.pop((dataset, first), None)
        if size is None:
            return
        firsts, counts = self._sets[dataset]
        del firsts[bisect.bisect_left(firsts, first)], self._when[dataset, first]
        (self.folder / dataset / f"{first}-{counts.pop(first)}").unlink(missing_ok=True)
        self.used -= size

    def _shrink(self, room: int, next_use: int | None = None) -> bool:
        """Make room; False where all that is held is needed before `next_use`."""
        while self.used + room > self.limit and self._next:
            when, dataset, first = self._next[0]
            if self._when.get((dataset, first)) != -when:  # used again since, or gone
                heapq.heappop(self._next)
                continue
            if next_use is not None and -when <= next_use:
                return False
            heapq.heappop(self._next)
            self._remove(dataset, first)
        return self.used + room <= self.limit


def _take_folder(root: Path) -> tuple[Path, int]:
    """The first of root/0, root/1, … that no living process holds, and the lock on it: the kernel lets go of it when the process ends."""
    number = 0
    while True:
        folder = root / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, held
        except BlockingIOError:
            os.close(held)
            number += 1
