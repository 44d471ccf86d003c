"""The order of samples as a pure function of (seed, number of samples, constants, step): no table, no state but the step.

The run is an endless stream of virtual ids v = epoch · N + sample. It is cut into chunks of `chunk` consecutive virtual ids; the chunks of an
epoch are permuted by a keyed Feistel network; `lanes` independent chunk streams each give batch / lanes samples to every step, shuffled inside
blocks of `block` chunks. Any process can compute any slot of any step, so every number of processes and workers sees the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ODD, _MIX, _29, _32 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 29, 32))
_MASK = (1 << 64) - 1


def _hash(x: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    x = (x ^ key) * _ODD  # uint64 arrays wrap around
    x = (x ^ (x >> _29)) * _MIX
    return x ^ (x >> _32)


def fold(*numbers: int) -> int:
    """One 64-bit key from several whole numbers."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _hash(key, np.array([number & _MASK], np.uint64))
    return int(key[0])


def permute(index: np.ndarray, count: int, key: int | np.ndarray, rounds: int = 6) -> np.ndarray:
    """Where a keyed permutation of range(count) sends the integers `index` [n]; `key` is one for all, or one each [n].

    A Feistel network on the next even number of bits, walked until the result falls below `count`: O(1) memory, any element alone.
    """
    out = np.array(index, np.uint64)
    if count <= 1:
        return out.astype(np.int64)
    half = (int(count - 1).bit_length() + 1) // 2
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = np.broadcast_to(np.array(key, np.uint64), out.shape)
    todo = np.arange(out.size)
    while todo.size:
        left, right = out[todo] >> shift, out[todo] & low
        for r in range(rounds):
            left, right = right, left ^ (_hash(right, _hash(keys[todo], np.uint64(r))) & low)
        out[todo] = (left << shift) | right
        todo = todo[out[todo] >= np.uint64(count)]
    return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which samples each global batch holds. `count` samples; `batch` per step. Memory for shuffling: lanes · block · chunk samples."""

    count: int
    batch: int
    seed: int = 0
    shuffle: bool = True
    chunk: int = 16
    block: int = 32
    max_lanes: int = 64

    @property
    def lanes(self) -> int:
        """The largest divisor of the batch up to `max_lanes`."""
        return max(n for n in range(1, min(self.max_lanes, self.batch) + 1) if self.batch % n == 0)

    def slots(self, step: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(sample ids, epochs) of the slots [first, last) of the global batch at `step`."""
        lanes, window = self.lanes, self.block * self.chunk
        per_lane = self.batch // lanes
        slot = np.arange(first, last, dtype=np.int64)
        if not self.shuffle:
            virtual = step * self.batch + slot
            return virtual % self.count, virtual // self.count
        lane, place = slot // per_lane, step * per_lane + slot % per_lane
        block, inside = place // window, place % window
        key = _hash(_hash(lane.astype(np.uint64), np.array(fold(self.seed, 1), np.uint64)), block.astype(np.uint64))
        inside = permute(inside, window, key)
        number = (block * self.block + inside // self.chunk) * lanes + lane  # of the chunk in the run
        virtual = self._shuffled_chunk(number) * self.chunk + inside % self.chunk
        return virtual % self.count, virtual // self.count

    def _shuffled_chunk(self, number: np.ndarray) -> np.ndarray:
        """The chunk that stands at place `number` of the run; chunks change places inside the epoch that holds their first sample."""
        epoch = number * self.chunk // self.count
        out = np.empty_like(number)
        for e in np.unique(epoch):
            low, high = -(-int(e) * self.count // self.chunk), -(-(int(e) + 1) * self.count // self.chunk)
            here = epoch == e
            out[here] = low + permute(number[here] - low, high - low, fold(self.seed, 2, int(e)))
        return out
