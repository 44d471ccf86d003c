"""Shared memory that workers write batches into, used again as soon as the trainer has let go of a batch.

A fresh piece for every batch would cost more than reading the samples did: the kernel zeroes every page of it (0.04 ms of 0.14 for a sample of
60 kB). A batch may be kept as long as one likes: its slab is simply not used again before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

COUNT = 16  # slabs per worker that are used again; further ones are made for one batch only


class Slabs:
    """`take` in the workers; `received` and `collect` in the trainer."""

    def __init__(self, workers: int):
        self._busy = torch.zeros(max(1, workers), COUNT, dtype=torch.uint8).share_memory_()
        self._held: dict[int, dict[str, Tensor]] = {}  # this worker's, by number
        self._out: list[tuple[int, int, list[StorageWeakRef]]] = []  # (worker, number, what the trainer still holds)

    def take(self, size: int, parts: dict[str, Any]) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """(tensors with room for `size` samples like `parts`, (worker, number) of the slab; number −1: not to be used again)."""
        like = {key: np.asarray(part) for key, part in parts.items()}
        info = get_worker_info()
        if info is None:
            return {key: torch.empty((size, *part.shape), dtype=_dtype(part)) for key, part in like.items()}, (0, -1)
        free = (self._busy[info.id] == 0).nonzero()
        number = int(free[0]) if len(free) else -1
        slab = self._held.get(number)
        if slab is None or {k: (t.shape, t.dtype) for k, t in slab.items()} != {
            k: ((size, *p.shape), _dtype(p)) for k, p in like.items()
        }:
            slab = {key: _shared(size, part) for key, part in like.items()}
        if number >= 0:
            self._held[number] = slab
            self._busy[info.id, number] = 1
        return slab, (info.id, number)

    def received(self, slab: tuple[int, int], batch: dict[str, Tensor]) -> None:
        """The trainer has a batch: straight from the slab, or copied into pinned memory."""
        worker, number = slab
        if number >= 0:
            held = [StorageWeakRef(t.untyped_storage()) for t in batch.values() if t.is_shared() and not t.is_pinned()]
            self._out.append((worker, number, held))

    def collect(self) -> None:
        """Give back the slabs of batches that nobody holds any more."""
        still = []
        for worker, number, held in self._out:
            if all(storage.expired() for storage in held):
                self._busy[worker, number] = 0
            else:
                still.append((worker, number, held))
        self._out = still


def _dtype(part: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, part.dtype)).dtype


def _shared(size: int, part: np.ndarray) -> Tensor:
    storage = torch.UntypedStorage._new_shared(max(1, size * part.nbytes), device="cpu")
    return torch.empty(0, dtype=_dtype(part)).set_(storage, 0, (size, *part.shape))  # type: ignore[call-overload]
