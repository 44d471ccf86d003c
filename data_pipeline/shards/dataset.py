"""The interface of a dataset that the stream and the trainer use. `samples.py` implements it for samples in tar shards,
and `rows.py` for rows of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from common.errors import Absent, DataError
from data_pipeline.order.budget import AnyPlan, BatchBudget, BudgetPlan
from data_pipeline.order.schedule import Phase, Plan
from data_pipeline.shards.durations import durations_of
from data_pipeline.shards.manifest import Manifest, parse_manifest, render_manifest
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.storage.ranges import RangeReader
from data_pipeline.storage.urls import write_atomically


class Part(Protocol):
    """The methods of a part (`data_pipeline/parts/`) that a dataset calls."""

    extensions: ClassVar[tuple[str, ...]]

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> Any: ...
    def absent(self) -> Absent: ...


class Piece(NamedTuple):
    """Consecutive samples of one shard and their index records."""

    first: int  # number of the first sample in the dataset
    url: str  # of the shard
    records: np.ndarray  # [n, extensions of the dataset]
    ranges: tuple[tuple[int, int], ...] = ()  # byte ranges to read, if the records do not determine them (`rows.py`)


class Dataset(Protocol):
    """Samples with the numbers 0 to len − 1. A sample consists of members, each a byte range of a shard.

    A member is identified by its column, the position of its extension in `extensions`. The members of a sample are
    passed as {column: bytes, or a value that the dataset makes from them}. The value is a `Damaged` exception if the
    member could not be read.
    """

    specs: list[str]  # the folders, tars and globs that the user named
    names: str  # the specs as one text, for messages
    manifests: list[Any]  # one per spec
    extensions: list[str]
    reader: RangeReader
    length: int  # number of tokens of a sample that are targets in training; 0 for a dataset without tokens
    unit: str  # the word for samples in messages: "samples" or "rows"

    def __len__(self) -> int: ...
    @property
    def id(self) -> str:
        """A hash of every byte of the shards and of all options that affect the order or the content of the samples."""

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of the tokens; None for a dataset without tokens."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which another process (`prefetch_server.py`) opens the same dataset."""

    @property
    def total_bytes(self) -> int: ...
    def merged(self) -> Manifest:
        """One manifest of the shards of all specs, as it is stored in a run folder."""

    def url(self, shard: int) -> str: ...
    def name(self, number: int) -> tuple[str, str]:
        """(shard, key) of a sample, for messages. This reads the key from the shard."""

    def location(self, number: int) -> tuple[str, int]:
        """(shard, number within the shard, from 0) of a sample. This reads nothing from the shard."""

    def columns(self, extensions: Iterable[str]) -> list[int]:
        """The columns of the given extensions. Extensions that the dataset does not have are ignored."""

    def pieces(self, number: int, count: int) -> list[Piece]:
        """The samples [number, number + count) as pieces. The samples of a piece are in one shard."""

    def ranges(self, piece: Piece, columns: list[int]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """How to read the members of a piece in the given columns: (the offset that the records give to the first byte,
        the byte ranges of the shard).
        """

    def read_columns(self, number: int, columns: list[int]) -> dict[int, Any]:
        """Read the members of a sample in this process. Raises Damaged."""

    def checked(self, number: int, members: dict[int, Any]) -> dict[int, Any]:
        """The members of a sample from the prefetch server, after the checks that the server's client does not make."""

    def sample(self, number: int, members: dict[int, Any], parts: Mapping[str, Part]) -> dict[str, Any]:
        """Decode a sample for the objective's views: {name of a part: its decoded value}. Raises Damaged."""


def store_manifests(datasets: Sequence[Dataset], folder: Path) -> None:
    """Store the manifests of the datasets of a run in `folder`. If manifests are stored there already, compare them,
    and raise DataError if the data has changed.
    """
    for n, dataset in enumerate(datasets):
        path, current = folder / f"{n}.json", dataset.merged()
        if not path.is_file():
            write_atomically(str(path), [render_manifest(current).encode()])
            continue
        stored = parse_manifest(path.read_bytes(), str(folder), str(path))
        if stored.id != current.id and (difference := stored.first_difference(current)):
            raise DataError(
                f"{dataset.names}: is not the data that this run was started on: {difference}. The run cannot be"
                " resumed exactly; restore the shards, or start a new run"
            )


def make_plan(
    datasets: Sequence[Dataset], phases: list[Phase], seed: int, shuffle: bool, budget: BatchBudget | None = None
) -> AnyPlan:
    """The plan of a run on these datasets. It is the same in every process. `budget`: the total length of a batch of
    recordings, whose lengths are read or measured here."""
    if budget is not None:
        (dataset,) = datasets
        return BudgetPlan(durations_of(dataset), budget, seed, shuffle, dataset.names)
    return Plan([len(d) for d in datasets], phases, seed, shuffle, [d.total_bytes / len(d) for d in datasets])
