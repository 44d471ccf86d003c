"""Features of labelled samples, which are extracted once and kept on disk, so that no protocol holds a set in memory.

The features of a set are a folder FOLDER/KEY. KEY is a hash of everything that determines them: the weights and the
options of the model, how its output is pooled, how samples are prepared, and every byte of the shards. It holds

    features.npy    float32 [S, D], one row for each sample of the shards; rows of samples that were left out are 0.
                    It ends with a random id of the file
    N.json          the record of piece N, which is PIECE consecutive samples: which of them have features, their
                    classes, which were damaged, and how many were left out; and the id of the file that has the rows.
                    It is written after the rows of the piece are on the disk
    .lock           byte N is locked by the process that extracts piece N
    .use            locked (shared) by the processes that write or read the set; deletion needs an exclusive lock

Only pieces with a record are used, so an interrupted extraction continues with the piece that it was in. Several
processes that extract the same set, for example one for each GPU, share its pieces. KEY does not depend on the device:
features from a CPU and from a GPU differ by rounding only, and pieces of both can be in one set.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
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
from eval.feature_files import Table, Use, delete_set, errors_about, remembered, share_work, table_id, write_whole
from eval.feature_rows import FeatureRows

VERSION = 2  # of the features; is increased by every change that can affect them, and is part of KEY
PIECE = 4096  # samples
TABLE = "features.npy"
RETRIES = 64  # damaged samples that are read again together
MAX_BYTES = 64 * 2**30  # of all sets in the user's cache, see `make_room`


class Unlabelled(Damaged):
    """A sample that belongs to no class: its label is null, or it has none although others have."""


class Source(Protocol):
    """Base class of `Encoder` and `TextEncoder`: what the extraction needs of an encoder, and the sets whose features
    it has."""

    name: str
    unit: str  # the word for samples in messages and results
    batch: int  # samples that are encoded together
    members: Sequence[str]  # extensions of the member that is encoded
    cache: Path | None = None  # the folder of the cache; None: the user's
    max_layers: int = 0  # number of last blocks whose class tokens it can give; 0: it gives one vector for each sample
    layers: int = 0  # of these, the number whose class tokens are stored, beside the mean of the patches; 0: one vector

    def labelled(self, specs: Sequence[str]) -> Labelled:
        """Features and classes of all labelled samples in the shards, in order. Damaged samples and those without an
        image or a text, or without a label, are left out."""
        key = self._key(specs)
        if key not in self._sets:
            self._sets[key] = labelled(self, specs, self.cache)
        return self._sets[key]

    def _key(self, specs: Sequence[str]) -> tuple[str, ...]:
        """Of a set in `_sets`."""
        return (*specs, str(self.layers))

    def delete_features(self) -> None:
        """Delete the cached features of this encoder that no other process uses."""
        delete(self._sets)

    @cached_property
    def _sets(self) -> dict[tuple[str, ...], Labelled]:
        return {}

    def fingerprint(self, samples: Samples) -> str:
        """A text that differs if the features of a sample may differ."""

    def check(self, specs: Sequence[str]) -> Samples:
        """The samples of the shards. Raises DataError if the encoder cannot read them."""

    def read(self, samples: Samples, number: int) -> Any:
        """One sample, prepared for `pooled`. Raises Damaged."""

    def stand_in(self) -> Any:
        """A prepared sample without content, from which the shape of the features is found."""

    def label(self, samples: Samples, number: int) -> str:
        """Raises Unlabelled, Damaged, or DataError if no label is there."""

    def pooled(self, inputs: Any) -> Tensor:
        """Features [B, D], fp32 on the CPU, of several prepared samples."""

    def stored(self, inputs: Any) -> Tensor:
        """What is stored of several prepared samples, fp32 on the CPU; `pooled_columns` of it are their features."""
        return self.pooled(inputs)

    @property
    def pooled_columns(self) -> slice:
        return slice(None)


@dataclass
class Labelled:
    """Features and classes of the labelled samples of a set, in the order of the shards."""

    features: FeatureRows | Tensor  # [N, D]
    classes: Tensor  # long [N], indices into `names`
    names: list[str]  # of the classes that occur, sorted
    left_out: int  # number of damaged samples
    passed_over: int  # number of samples without an image or a text
    unlabelled: int  # number of samples without a label
    not_finite: int  # number of samples whose features are NaN or infinite
    hashes: np.ndarray  # uint64, of the image or text of every sample of the set; 0 for samples without one
    folder: Path  # that holds the features
    use: Use | None = None  # keeps the folder from deletion by other processes

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def numbers(self) -> np.ndarray:
        """The number of each sample in its set [N]."""
        assert isinstance(self.features, FeatureRows)
        return self.features.numbers

    def stored(self) -> FeatureRows | Tensor:
        """All that is stored of each sample, see `Source.stored`."""
        return self.features.whole() if isinstance(self.features, FeatureRows) else self.features


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
    target = _target(encoder, samples, folder)
    with errors_about(target):
        use = Use(target)
    for _ in range(2):
        _extract(encoder, samples, target, sys.maxsize if folder else MAX_BYTES)
        hashes = samples.hashes(encoder.members)
        with errors_about(target):
            found_records = [_record(target, str(piece)) for piece in range(_pieces(samples))]
            records = [record for record in found_records if record is not None]
            if len(records) == len(found_records):
                found = _assembled(encoder, samples, target, records, hashes, use)
                if {record["table"] for record in records} <= {"", table_id(target / TABLE)}:  # it is still that table
                    return found
    raise DataError(f"{target}: its files were deleted while they were used; run the command again")


def missing(encoder: Source, samples: Samples, folder: Path | None) -> int:
    """The number of samples whose features an extraction would have to compute. Writes nothing."""
    target = _target(encoder, samples, folder)
    if not target.is_dir():
        return len(samples)
    lacking = [piece for piece in range(_pieces(samples)) if _record(target, str(piece)) is None]
    return sum(min(len(samples), (piece + 1) * PIECE) - piece * PIECE for piece in lacking)


def _target(encoder: Source, samples: Samples, folder: Path | None) -> Path:
    """The folder of a set's features."""
    key = xxhash.xxh3_128_hexdigest(f"{VERSION} {PIECE} {samples.id} {encoder.fingerprint(samples)}".encode())
    return (folder or cache_folder("features")) / key


def delete(sets: dict[tuple[str, ...], Labelled]) -> None:
    """Empty this dictionary, and delete the files of its sets that no other process uses."""
    folders = []
    while sets:
        _, each = sets.popitem()
        folders.append(each.folder)
        each.use = None
    for folder in folders:
        delete_set(folder)


def _pieces(samples: Samples) -> int:
    return -(-len(samples) // PIECE)


def _record(target: Path, piece: str) -> dict[str, Any] | None:
    """The record of a piece, or None if there is none, or if its rows are in a table that does not exist any more."""
    try:
        record = json.loads((target / f"{piece}.json").read_text())
    except FileNotFoundError:
        return None
    return record if record["table"] in ("", table_id(target / TABLE)) else None


def _assembled(
    encoder: Source, samples: Samples, target: Path, records: list[dict[str, Any]], hashes: np.ndarray, use: Use
) -> Labelled:
    """The set that the records of all pieces describe."""
    total = {key: sum(record[key] for record in records) for key in ("absent", "unlabelled", "not_finite")}
    numbers = np.concatenate([np.array(record["numbers"], np.int64) for record in records])
    if not len(numbers):
        why = f"; {total['unlabelled']} of them have no label" if total["unlabelled"] else ""
        raise DataError(f"{samples.names}: none of the {len(samples)} {encoder.unit} can be read and has a label{why}")
    names = sorted({name for record in records for name in record["names"]})
    index = {name: n for n, name in enumerate(names)}
    classes = [np.array([index[name] for name in record["names"]], np.int64)[record["classes"]] for record in records]
    return Labelled(
        FeatureRows(target / TABLE, numbers, encoder.pooled_columns),
        torch.from_numpy(np.concatenate(classes)),
        names,
        sum(len(record["damaged"]) for record in records),
        total["absent"],
        total["unlabelled"],
        total["not_finite"],
        hashes,
        target,
        use,
    )


# ---------------------------------------------------------------- extraction
def _extract(encoder: Source, samples: Samples, target: Path, max_bytes: int) -> None:
    """Extract all pieces that have no record, and those with damaged samples that can be read now."""

    @remembered
    def is_done(piece: str) -> bool:
        with errors_about(target):
            record = _record(target, piece)
        return record is not None and not any_readable(partial(_read, encoder, samples), record["damaged"])

    names = [str(piece) for piece in range(_pieces(samples))]
    missing = [name for name in names if not is_done(name)]
    with errors_about(target):
        try:
            os.utime(target)  # the set is used now
        except OSError:  # a complete set may be one that the user may only read
            if missing:
                raise
    share_work(target, names, is_done, lambda name: _extract_piece(encoder, samples, target, int(name), max_bytes))


def _read(encoder: Source, samples: Samples, number: int) -> tuple[Any, str] | Damaged:
    """(prepared sample, label), or why it cannot be used."""
    try:
        return encoder.read(samples, number), encoder.label(samples, number)
    except Damaged as reason:
        return reason


def label_of(samples: Samples, number: int) -> str:
    """The label of a sample by its .cls member. Raises Unlabelled if it has none, but other samples of the set have, and
    DataError if no sample has one."""
    if "cls" in samples.extensions and not samples.has(number, "cls"):
        raise Unlabelled("holds no .cls member")
    return samples.label(number)


def any_readable(read: Callable[[int], Any], damaged: Sequence[int]) -> bool:
    """Whether `read` returns something else than a damaged sample now for one of the samples that were damaged, which
    errors of storage can have been the cause of."""
    return any(not is_damaged(one) for _, found in read_batches(read, damaged, RETRIES) for one in found)


def is_damaged(found: Any) -> bool:
    """Whether this is the reason why a sample cannot be used, and it may be another one at the next attempt."""
    return isinstance(found, Damaged) and not isinstance(found, (Absent, Unlabelled))


def _extract_piece(encoder: Source, samples: Samples, target: Path, piece: int, max_bytes: int) -> None:
    """Write the rows of one piece, and then its record."""
    record: dict[str, Any] = {
        "numbers": [],
        "classes": [],
        "damaged": [],
        "absent": 0,
        "unlabelled": 0,
        "not_finite": 0,
    }
    names: dict[str, int] = {}
    table = None
    for numbers, found in read_batches(
        partial(_read, encoder, samples), range(piece * PIECE, min(len(samples), (piece + 1) * PIECE)), encoder.batch
    ):
        usable = []
        for number, one in zip(numbers, found, strict=True):
            if is_damaged(one):
                record["damaged"].append(number)
            elif isinstance(one, Damaged):
                record["absent" if isinstance(one, Absent) else "unlabelled"] += 1
            else:
                usable.append(one[0])
                record["numbers"].append(number)
                record["classes"].append(names.setdefault(one[1], len(names)))
        if not usable:
            continue
        features = encoder.stored(usable)  # [b, D]
        record["not_finite"] += int((~features.isfinite().all(1)).sum())
        rows = np.zeros((len(found), features.shape[1]), np.float32)  # [B, D]
        rows[[not isinstance(one, Damaged) for one in found]] = features.numpy()
        with errors_about(target):
            table = table or Table(target / TABLE, (len(samples), rows.shape[1]), max_bytes)
            table.write(numbers[0], rows)
    with errors_about(target):
        if table is not None:
            table.close()
        record |= {"table": table.id if table else "", "names": list(names)}
        write_whole(target / f"{piece}.json", json.dumps(record).encode())


def read_batches(
    read: Callable[[int], Any], numbers: Sequence[int], batch: int
) -> Iterator[tuple[Sequence[int], list[Any]]]:
    """(numbers, what `read` returns for each) of consecutive batches. Threads read the next batch while the caller uses
    one, so at most two batches are in memory."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        waiting: deque[tuple[Sequence[int], list[Future[Any]]]] = deque()
        for first in range(0, len(numbers), batch):
            part = numbers[first : first + batch]
            waiting.append((part, [pool.submit(read, number) for number in part]))
            if len(waiting) > 1:
                part, results = waiting.popleft()
                yield part, [each.result() for each in results]
        for part, results in waiting:
            yield part, [each.result() for each in results]
    finally:
        pool.shutdown(cancel_futures=True)


def model_hash(model: nn.Module) -> str:
    """A hash of a model's options and of the names, shapes and values of its weights and buffers."""
    out = xxhash.xxh3_128()
    cfg = getattr(model, "cfg", None)
    out.update(f"{type(model).__qualname__} {config.to_dict(cfg) if isinstance(cfg, config.Section) else cfg}".encode())
    for name, tensor in model.state_dict().items():
        out.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        out.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return out.hexdigest()
