"""Rows of features, which protocols read in parts: from a feature file by memory map, some of them, or standardised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 4096  # rows that `statistics` reads together


class Rows(Protocol):
    """Rows of features [N, D], fp32: a tensor, or a class that reads them when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Tensor: ...


class FeatureRows:
    """Rows of a feature file, or some columns of them, which are read by memory map: `rows[a:b]` and `rows[numbers]` are
    fp32 tensors on the CPU. A tensor [N, D] can stand in its place."""

    def __init__(self, path: Path, numbers: np.ndarray, columns: slice = slice(None)):
        self._path, self._columns = path, columns
        self.numbers = numbers  # [N], rows of the file, which are the numbers of the samples
        self._table = np.load(path, mmap_mode="r").view(np.ndarray)[:, columns]  # a view
        self.shape: tuple[int, ...] = (len(numbers), self._table.shape[1])

    def whole(self) -> FeatureRows:
        """The same rows with all columns of the file."""
        return self if self._columns == slice(None) else FeatureRows(self._path, self.numbers)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        numbers = self.numbers[rows if isinstance(rows, slice) else rows.numpy()]
        return torch.from_numpy(self._table[numbers])


def chunks(rows: Rows, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, fp32 features [≤ size, D] on the device) of consecutive rows."""
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size].to(device)


def statistics(
    rows: Rows, device: torch.device | str = "cpu", correction: int = 1, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation + epsilon) of the features, fp32 [D] on the device; sums are computed in fp64, in two
    passes. The variance is the sum of squares divided by N − `correction`."""
    mean = sum(part.double().sum(0) for _, part in chunks(rows, CHUNK, device)) / len(rows)
    squares = sum((part.double() - mean).square().sum(0) for _, part in chunks(rows, CHUNK, device))
    return mean.float(), (squares / max(1, len(rows) - correction)).sqrt().float() + epsilon


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
