"""Shared-memory buffers that data workers write batches into. A buffer is reused as soon as the trainer has freed its
batch.

A new allocation for every batch would cost more than reading the samples: the kernel zeroes every page of it (0.04 ms
of 0.14 ms for a sample of 60 kB). The trainer may keep a batch as long as it likes: its buffer is not reused before the
batch is freed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

from common.errors import DataError

SHARED_MEMORY = "/dev/shm"  # the file system that shared memory comes from, on Linux
BUFFERS_PER_WORKER = 16  # buffers of a worker that are reused; a further buffer serves one batch only


class BatchBuffers:
    """The workers call `take`; the trainer calls `received` and `collect`."""

    def __init__(self, workers: int):
        self._busy = torch.zeros(max(1, workers), BUFFERS_PER_WORKER, dtype=torch.uint8).share_memory_()
        self._buffers: dict[int, dict[str, Tensor]] = {}  # the buffers of this worker, by number
        self._in_use: list[tuple[int, int, list[StorageWeakRef]]] = []  # (worker, number, storages of its batch)

    def take(self, size: int, parts: dict[str, Any]) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """(tensors with room for `size` samples shaped like `parts`, (worker, number) of the buffer).

        Number −1 means that the buffer is not reused.
        """
        samples = {key: np.asarray(part) for key, part in parts.items()}  # of one sample
        info = get_worker_info()
        if info is None:
            return {key: torch.empty((size, *part.shape), dtype=_dtype(part)) for key, part in samples.items()}, (0, -1)
        free = (self._busy[info.id] == 0).nonzero().flatten().tolist()
        layout = {key: ((size, *part.shape), _dtype(part)) for key, part in samples.items()}
        number = next((n for n in free if self._layout(n) == layout), free[0] if free else -1)
        if self._layout(number) == layout:
            buffer = self._buffers[number]
        else:
            buffer = {key: _shared(size, part) for key, part in samples.items()}
        if number >= 0:
            self._buffers[number] = buffer
            self._busy[info.id, number] = 1
        return buffer, (info.id, number)

    def _layout(self, number: int) -> dict[str, Any]:
        """{name: (shape, dtype)} of the tensors of a buffer of this worker."""
        return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in self._buffers.get(number, {}).items()}

    def received(self, buffer: tuple[int, int], batch: dict[str, Tensor]) -> None:
        """Note that the trainer has received a batch: in the buffer itself, or copied into pinned memory."""
        worker, number = buffer
        if number >= 0:
            refs = [StorageWeakRef(t.untyped_storage()) for t in batch.values() if t.is_shared() and not t.is_pinned()]
            self._in_use.append((worker, number, refs))

    def collect(self) -> None:
        """Mark the buffers of batches that have been freed as free."""
        still_in_use = []
        for worker, number, refs in self._in_use:
            if all(storage.expired() for storage in refs):
                self._busy[worker, number] = 0
            else:
                still_in_use.append((worker, number, refs))
        self._in_use = still_in_use


def _dtype(part: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, part.dtype)).dtype


def _shared(size: int, part: np.ndarray) -> Tensor:
    """A zeroed tensor [size, *part.shape] in shared memory."""
    wanted = max(1, size * part.nbytes)
    # statvfs does not count memory that was allocated and not written yet
    free = os.statvfs(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    left = wanted if free is None else free.f_bavail * free.f_frsize
    if left < wanted:
        raise DataError(
            f"{SHARED_MEMORY}: has {left / 1e6:.0f} MB left, but a batch takes {wanted / 1e6:.0f} MB of shared memory;"
            " make it larger (docker run --shm-size=8g, or --ipc=host), or write data.workers=0"
        )
    storage = torch.UntypedStorage._new_shared(wanted, device="cpu")
    out = torch.empty(0, dtype=_dtype(part)).set_(storage, 0, (size, *part.shape))  # type: ignore[call-overload]
    return out.zero_()  # commits the memory now; a later write to a page that the kernel cannot provide is a SIGBUS
