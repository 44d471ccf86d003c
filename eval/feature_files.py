"""The files in which features are kept: tables whose rows several processes write, work that processes share, and the
deletion of sets of features that no process uses.

A set is a folder of a cache; `feature_cache.py` says what it holds. Of its two lock files, LOCK shares the work of an
extraction, and USE is locked (shared) by every process that writes or reads the set, so that no other one deletes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from common.errors import DataError

LOCK = ".lock"
USE = ".use"
ID_BYTES = 16  # at the end of a table
RESERVE = 16 * 2**30  # bytes that the deletion of old sets leaves free for checkpoints; at most 5 % of the disk
DISK_SHARE = 0.25  # of the disk, which all sets of a cache may take
UNLOCKED_SECONDS = 24 * 3600  # on a file system without locks, a set is deleted if it was not opened for this time
POLL_SECONDS = 0.2, 2.0  # between looks at the work of other processes: at first, and at most
CACHE_ADVICE = "delete that folder, or set UNLABELED_CACHE=FOLDER to a folder with more space"


@contextlib.contextmanager
def errors_about(folder: Path, advice: str = CACHE_ADVICE) -> Iterator[None]:
    """Turn the error of a file that cannot be written or is damaged into a DataError with an advice. Only for code that
    does nothing but use files of this folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: features cannot be kept there ({reason}); {advice}") from None


# ---------------------------------------------------------------- tables
class Table:
    """A .npy file of float32 [S, D], opened for writing rows; created if no process has created it yet.

    The file ends with ID_BYTES random bytes, its `id`. Records of rows name it, so that they are not taken for records
    of the rows of another file that replaced this one. Rows are written by system calls, because a write to mapped
    memory ends the process if the disk is full. `max_bytes`: see `make_room`.
    """

    def __init__(self, path: Path, shape: tuple[int, int], max_bytes: int):
        size, exists = 4 * shape[0] * shape[1], path.is_file()
        written = path.stat().st_blocks * 512 if exists else 0
        make_room(path.parent, size, max(0, size - written), max_bytes)
        if not exists:
            free = shutil.disk_usage(path.parent).free
            if size > free:
                raise DataError(
                    f"{path.parent}: the features need {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; set"
                    " UNLABELED_CACHE=FOLDER to a folder on a larger disk"
                )
            _create(path, shape)
        self._file = os.open(path, os.O_RDWR)
        self.id = _id_of(self._file)
        self._row_bytes, self._offset = 4 * shape[1], os.fstat(self._file).st_size - ID_BYTES - size

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write consecutive rows [n, D] from row `first`."""
        data, at = memoryview(rows).cast("B"), self._offset + first * self._row_bytes
        while len(data):
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        """Close the file once all rows are on the disk."""
        os.fsync(self._file)
        os.close(self._file)


def _create(path: Path, shape: tuple[int, int]) -> None:
    """Create a sparse file of zeros, unless another process creates it first."""
    partial = _partial(path)
    try:
        np.lib.format.open_memmap(partial, "w+", np.float32, shape)
        with partial.open("ab") as file:
            file.write(secrets.token_bytes(ID_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)  # unlike a rename, this replaces no file of another process
    finally:
        partial.unlink(missing_ok=True)


def _id_of(file: int) -> str:
    return os.pread(file, ID_BYTES, os.fstat(file).st_size - ID_BYTES).hex()


def table_id(path: Path) -> str:
    """The `id` of a table; "" if the file does not exist."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        return _id_of(file)
    finally:
        os.close(file)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file that exists only once all of it is on the disk."""
    partial = _partial(path)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _partial(path: Path) -> Path:
    """A name for an incomplete file, which no other process uses, on this machine or on another one."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


# ---------------------------------------------------------------- shared work
def share_work(folder: Path, names: Iterable[str], is_done: Callable[[str], bool], work: Callable[[str], None]) -> None:
    """Call `work(name)`, which completes a file, for every name for which `is_done(name)` is false.

    Processes that do this in the same folder share the names: each takes one that no living process works on, and
    returns when all are done. On a file system without locks each process does all of them.
    """
    missing = [(n, name) for n, name in enumerate(names) if not is_done(name)]
    if not missing:
        return
    lock, pause = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644), POLL_SECONDS[0]
    try:
        while missing:
            completed = {name for n, name in missing if _work_alone(folder, lock, n, name, is_done, work)}
            if not completed:
                time.sleep(pause)
            pause = POLL_SECONDS[0] if completed else min(1.5 * pause, POLL_SECONDS[1])
            missing = [(n, name) for n, name in missing if name not in completed and not is_done(name)]
    finally:
        os.close(lock)


def remembered(is_done: Callable[[str], bool]) -> Callable[[str], bool]:
    """The same function, which is not called again for a name that is done."""
    done: set[str] = set()

    def ask(name: str) -> bool:
        if name not in done and is_done(name):
            done.add(name)
        return name in done

    return ask


def _work_alone(
    folder: Path, lock: int, n: int, name: str, is_done: Callable[[str], bool], work: Callable[[str], None]
) -> bool:
    """Call `work(name)` while byte `n` of the lock is held. Returns False if another process holds it."""
    is_locked = True
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, n)
    except BlockingIOError:
        return False
    except OSError:
        is_locked = False  # no locks here
    try:
        if not is_done(name):
            if is_locked:  # so these are files of processes that were killed
                for partial in folder.glob(f".{name}.*.partial"):
                    partial.unlink(missing_ok=True)
            work(name)
    finally:
        with contextlib.suppress(OSError):
            fcntl.lockf(lock, fcntl.LOCK_UN, 1, n)
    return True


# ---------------------------------------------------------------- sets
class Use:
    """Keeps a set, whose folder is made if necessary, from deletion by other processes for as long as this object
    exists. It has no effect on a file system without locks, and in a folder that the user may only read."""

    def __init__(self, folder: Path):
        self._file = -1
        while self._file < 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._file = os.open(folder / USE, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the set was deleted since
            except OSError:
                return
            try:
                fcntl.flock(self._file, fcntl.LOCK_SH)
            except OSError:
                return
            if not _is_at(self._file, folder / USE):
                os.close(self._file)
                self._file = -1

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def delete_set(folder: Path) -> bool:
    """Delete a set, and return True, unless a process uses it or this process may not delete it. Files of the user's
    are kept."""
    try:
        age = time.time() - folder.stat().st_mtime
        use = os.open(folder / USE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return False
    try:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks here
            if age < UNLOCKED_SECONDS:
                return False
        if not _is_at(use, folder / USE):
            return False
        for file in folder.iterdir():
            if file.suffix in (".json", ".npy", ".partial") or file.name == LOCK:
                file.unlink(missing_ok=True)
        (folder / USE).unlink(missing_ok=True)  # last: a process that opens the set now makes a new file
    except OSError:
        return False
    finally:
        os.close(use)
    with contextlib.suppress(OSError):  # a file of the user's is in it, or a process has opened it again
        folder.rmdir()
    return True


def make_room(own: Path, size: int, missing: int, max_bytes: int) -> None:
    """Delete sets beside `own`, those that were used least recently first, until all sets take at most `max_bytes` and
    DISK_SHARE of the disk, and `missing` + RESERVE bytes are free. `own` has `size` bytes when it is complete, of which
    `missing` are not written yet. Sets that a process uses are kept."""
    disk = shutil.disk_usage(own)
    max_bytes, reserve = min(max_bytes, int(DISK_SHARE * disk.total)), min(RESERVE, disk.total // 20)
    sets: list[tuple[float, int, Path]] = []  # (time of the last use, bytes, folder)
    for folder in own.parent.iterdir():
        if folder != own and len(folder.name) == 32 and ((folder / USE).is_file() or (folder / LOCK).is_file()):
            with contextlib.suppress(FileNotFoundError):  # another process deletes it
                sets.append((folder.stat().st_mtime, _bytes(folder), folder))
    total = size + sum(found for _, found, _ in sets)
    for _, found, folder in sorted(sets):
        if total <= max_bytes and shutil.disk_usage(own).free >= missing + reserve:
            return
        if delete_set(folder):
            total -= found


def _bytes(folder: Path) -> int:
    """The size of a set when it is complete: a table has its final size from the beginning."""
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total
