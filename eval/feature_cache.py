"""Features of labelled samples, which are extracted once and kept on disk, so that no protocol holds a set in memory.

The features of a set are a folder FOLDER/KEY. KEY is a hash of everything that determines them: the weights and the
options of the model, how its output is pooled, how samples are prepared, and every byte of the shards. It holds

    features.npy    float32 [S, D], one row for each sample of the shards; rows of samples that were left out are 0
    N.json          the record of piece N, which is PIECE consecutive samples: which of them have features, their
                    classes, and how many were left out. It is written after the rows of the piece are on the disk.
    .lock           byte N is locked by the process that extracts piece N

Only pieces with a record are used, so an interrupted extraction continues with the piece that it was in. Several
processes that extract the same set, for example one for each GPU, share its pieces.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from common import config
from common.errors import Absent, Damaged, DataError
from data_pipeline.shards.samples import Samples
from data_pipeline.storage.urls import cache_folder

VERSION = 1  # of the features; is increased by every change that can affect them, and is part of KEY
PIECE = 4096  # samples
MAX_BYTES = 64 * 2**30  # of all sets in the user's cache; those that were used least recently are deleted
CACHE_ADVICE = "delete that folder, or set UNLABELED_CACHE=FOLDER to a folder with more space"
LOCK = ".lock"
POLL_SECONDS = 0.2  # between looks at pieces that other processes extract


class Unlabelled(Damaged):
    """A sample whose label is null: it belongs to no class."""


class Source(Protocol):
    """What the extraction needs of an encoder: `Encoder` or `TextEncoder`."""

    name: str
    unit: str
    batch: int  # samples that are encoded together
    members: Sequence[str]  # extensions of the member that is encoded

    def fingerprint(self, samples: Samples) -> str:
        """A text that differs if the features of a sample may differ."""

    def check(self, specs: Sequence[str]) -> Samples:
        """The samples of the shards. Raises DataError if the encoder cannot read them."""

    def read(self, samples: Samples, number: int) -> Any:
        """One sample, prepared for `pooled`. Raises Damaged."""

    def label(self, samples: Samples, number: int) -> str:
        """Raises Unlabelled, Damaged, or DataError if no label is there."""

    def pooled(self, inputs: Any) -> Tensor:
        """Features [B, D], fp32 on the CPU, of several prepared samples."""


class Rows(Protocol):
    """Rows of features [N, D], fp32: a tensor, or a class that reads them when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Tensor: ...


class FeatureRows:
    """Rows of a feature file, which are read by memory map: `rows[a:b]` and `rows[numbers]` are fp32 tensors on the
    CPU. A tensor [N, D] can stand in its place."""

    def __init__(self, path: Path, numbers: np.ndarray):
        self._table = np.load(path, mmap_mode="r").view(np.ndarray)
        self._numbers = numbers  # [N], rows of the file
        self.shape: tuple[int, ...] = (len(numbers), self._table.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        numbers = self._numbers[rows if isinstance(rows, slice) else rows.numpy()]
        return torch.from_numpy(self._table[numbers])


@dataclass
class Labelled:
    """Features and classes of the labelled samples of a set, in the order of the shards."""

    features: FeatureRows | Tensor  # [N, D]
    classes: Tensor  # long [N], indices into `names`
    names: list[str]  # of the classes that occur, sorted
    left_out: int  # number of damaged samples
    passed_over: int  # number of samples without an image or a text
    unlabelled: int  # number of samples whose label is null
    not_finite: int  # number of samples whose features are NaN or infinite
    hashes: np.ndarray  # uint64, of the image or text of every sample of the set; 0 for samples without one

    def __len__(self) -> int:
        return len(self.classes)


def chunks(rows: Rows, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, fp32 features [≤ size, D] on the device) of consecutive rows."""
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size].to(device)


def statistics(rows: Rows, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(mean, standard deviation + 1e-6) of the features, fp32 [D] on the device; sums are computed in fp64, in two
    passes."""
    mean = sum(part.double().sum(0) for _, part in chunks(rows, PIECE, device)) / len(rows)
    squares = sum((part.double() - mean).square().sum(0) for _, part in chunks(rows, PIECE, device))
    return mean.float(), (squares / max(1, len(rows) - 1)).sqrt().float() + 1e-6


class Subset:
    """Some rows of features, in a given order. `numbers`: long [n]."""

    def __init__(self, rows: Rows, numbers: Tensor):
        self._rows, self._numbers = rows, numbers
        self.shape = (len(numbers), rows.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._rows[self._numbers[rows]]


class Standardized:
    """Rows of features, minus a mean and divided by a standard deviation, on the device of these when they are
    indexed."""

    def __init__(self, rows: Rows, mean: Tensor, std: Tensor):
        self._rows, self._mean, self._std = rows, mean, std
        self.shape = tuple(rows.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return (self._rows[rows].to(self._mean.device) - self._mean) / self._std


def labelled(encoder: Source, specs: Sequence[str], folder: Path | None = None) -> Labelled:
    """The features of all labelled samples of the shards, extracted now unless the cache has them.

    `folder`: of the cache; default: `features` in the user's cache folder. Raises DataError if no sample is usable.
    """
    if not specs:
        raise DataError(
            f"no labelled {'text ' if encoder.unit == 'texts' else ''}shards are named; write eval.gallery=… and"
            " eval.test=… (or gallery=… query=… for `unlabeled eval`)"
        )
    samples = encoder.check(specs)
    key = xxhash.xxh3_128_hexdigest(f"{VERSION} {PIECE} {samples.id} {encoder.fingerprint(samples)}".encode())
    target = (folder or cache_folder("features")) / key
    _extract(encoder, samples, target, None if folder else MAX_BYTES)
    with errors_about(target):
        records = [json.loads((target / f"{piece}.json").read_text()) for piece in range(_pieces(samples))]
        return _assembled(encoder, samples, target, records)


@contextlib.contextmanager
def errors_about(folder: Path, advice: str = CACHE_ADVICE) -> Iterator[None]:
    """Turn the error of a file that cannot be written or is damaged into a DataError with an advice. Only for code that
    does nothing but use files of this folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{folder}: features cannot be kept there ({reason}); {advice}") from None


def _pieces(samples: Samples) -> int:
    return -(-len(samples) // PIECE)


def _assembled(encoder: Source, samples: Samples, target: Path, records: list[dict[str, Any]]) -> Labelled:
    """The set that the records of all pieces describe."""
    total = {key: sum(record[key] for record in records) for key in ("damaged", "absent", "unlabelled", "not_finite")}
    numbers = np.concatenate([np.array(record["numbers"], np.int64) for record in records])
    if not len(numbers):
        why = f"; {total['unlabelled']} of them have the label null" if total["unlabelled"] else ""
        raise DataError(f"{samples.names}: none of the {len(samples)} {encoder.unit} can be read and has a label{why}")
    names = sorted({name for record in records for name in record["names"]})
    index = {name: n for n, name in enumerate(names)}
    classes = [np.array([index[name] for name in record["names"]], np.int64)[record["classes"]] for record in records]
    return Labelled(
        FeatureRows(target / "features.npy", numbers),
        torch.from_numpy(np.concatenate(classes)),
        names,
        total["damaged"],
        total["absent"],
        total["unlabelled"],
        total["not_finite"],
        samples.hashes(encoder.members),
    )


# ---------------------------------------------------------------- extraction
def _extract(encoder: Source, samples: Samples, target: Path, max_bytes: int | None) -> None:
    """Extract all pieces that have no record."""
    names = [str(piece) for piece in range(_pieces(samples))]
    with errors_about(target):
        is_complete = all((target / f"{name}.json").is_file() for name in names)
        target.mkdir(parents=True, exist_ok=True)
        if max_bytes is not None and not is_complete:
            delete_oldest(target.parent, max_bytes, target)
        os.utime(target)  # the set is used now
    if not is_complete:
        share_work(target, names, ".json", lambda name: _extract_piece(encoder, samples, target, int(name)))


def _extract_piece(encoder: Source, samples: Samples, target: Path, piece: int) -> None:
    """Write the rows of one piece, and then its record."""
    record: dict[str, Any] = {"numbers": [], "classes": [], "damaged": 0, "absent": 0, "unlabelled": 0, "not_finite": 0}
    names: dict[str, int] = {}

    def read(number: int) -> tuple[Any, str] | Damaged:
        try:
            return encoder.read(samples, number), encoder.label(samples, number)
        except Damaged as reason:
            return reason

    table = None
    for numbers, found in read_batches(
        read, range(piece * PIECE, min(len(samples), (piece + 1) * PIECE)), encoder.batch
    ):
        usable = []
        for number, one in zip(numbers, found, strict=True):
            if isinstance(one, Damaged):
                record[{Absent: "absent", Unlabelled: "unlabelled"}.get(type(one), "damaged")] += 1
            else:
                usable.append(one[0])
                record["numbers"].append(number)
                record["classes"].append(names.setdefault(one[1], len(names)))
        if not usable:
            continue
        features = encoder.pooled(usable)  # [b, D]
        record["not_finite"] += int((~features.isfinite().all(1)).sum())
        rows = np.zeros((len(found), features.shape[1]), np.float32)  # [B, D]
        rows[[not isinstance(one, Damaged) for one in found]] = features.numpy()
        with errors_about(target):
            table = table or Table(target / "features.npy", (len(samples), rows.shape[1]))
            table.write(numbers[0], rows)
    with errors_about(target):
        if table is not None:
            table.close()
        write_whole(target / f"{piece}.json", json.dumps(record | {"names": list(names)}).encode())


class Table:
    """A .npy file of float32 [S, D], opened for writing rows; created if no process has created it yet.

    Rows are written by system calls, because a write to mapped memory ends the process if the disk is full.
    """

    def __init__(self, path: Path, shape: tuple[int, int]):
        if not path.is_file():
            need, free = 4 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
            if need > free:
                raise DataError(
                    f"{path.parent}: the features need {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there; set"
                    " UNLABELED_CACHE=FOLDER to a folder on a larger disk"
                )
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            np.lib.format.open_memmap(partial, "w+", np.float32, shape)  # a sparse file
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)  # unlike a rename, this replaces no file of another process
            partial.unlink()
        self._row_bytes, self._offset = 4 * shape[1], path.stat().st_size - 4 * shape[0] * shape[1]
        self._file = os.open(path, os.O_WRONLY)

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


def read_batches(
    read: Callable[[int], Any], numbers: Sequence[int], batch: int
) -> Iterator[tuple[Sequence[int], list[Any]]]:
    """(numbers, what `read` returns for each) of consecutive batches. Threads read the next batch while the caller uses
    one, so at most two batches are in memory."""
    with ThreadPool() as pool:
        waiting: deque[tuple[Sequence[int], Any]] = deque()
        for first in range(0, len(numbers), batch):
            part = numbers[first : first + batch]
            waiting.append((part, pool.map_async(read, part)))
            if len(waiting) > 1:
                part, result = waiting.popleft()
                yield part, result.get()
        for part, result in waiting:
            yield part, result.get()


def share_work(folder: Path, names: Iterable[str], ending: str, work: Callable[[str], None]) -> None:
    """Call `work(name)`, which writes the file name + ending, for every name that has no such file yet.

    Processes that do this in the same folder share the names: each takes one that no living process works on, and
    returns when all files exist. On a file system without locks each process does all of them.
    """
    names = list(names)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while missing := [(n, name) for n, name in enumerate(names) if not (folder / f"{name}{ending}").is_file()]:
            has_worked = False
            for n, name in missing:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, n)
                except BlockingIOError:
                    continue
                except OSError:
                    pass  # no locks here
                if not (folder / f"{name}{ending}").is_file():
                    work(name)
                    has_worked = True
                with contextlib.suppress(OSError):
                    fcntl.lockf(lock, fcntl.LOCK_UN, 1, n)
            if not has_worked:
                time.sleep(POLL_SECONDS)
    finally:
        os.close(lock)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file that exists only once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def delete_oldest(folder: Path, max_bytes: int, keep: Path) -> None:
    """Delete the sets that were used least recently, until all sets in the folder take at most `max_bytes`. Sets that a
    process extracts are kept; a process that has opened a set can go on reading it."""
    sets = [path for path in folder.iterdir() if len(path.name) == 32 and (path / LOCK).is_file() and path != keep]
    sizes = {path: sum(file.stat().st_blocks * 512 for file in path.iterdir()) for path in sets}
    for path in sorted(sets, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= max_bytes:
            return
        lock = os.open(path / LOCK, os.O_RDWR)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        finally:
            os.close(lock)
        for file in path.iterdir():
            if file.suffix in (".json", ".npy", ".partial") or file.name == LOCK:
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a file of the user's is in it
            path.rmdir()
        del sizes[path]


def model_hash(model: nn.Module) -> str:
    """A hash of a model's options and of the names, shapes and values of its weights and buffers."""
    out = xxhash.xxh3_128()
    cfg = getattr(model, "cfg", None)
    out.update(f"{type(model).__qualname__} {config.to_dict(cfg) if isinstance(cfg, config.Section) else cfg}".encode())
    for name, tensor in model.state_dict().items():
        out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return out.hexdigest()
