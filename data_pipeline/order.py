"""The order of samples as a pure function of (seed, number of samples, constants, step): no table, no state but the step.

The run is an endless stream of virtual ids v = epoch · N + sample. It is cut into chunks of `chunk` consecutive virtual ids; the chunks of an
epoch are permuted by a keyed Feistel network; `lanes` independent chunk streams each give batch / lanes samples to every step, shuffled inside
blocks of `block` chunks. Any process can compute any slot of any step, so every number of processes and workers sees the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ODD, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_MASK = (1 << 64) - 1


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x ^ key) * _ODD
        x = (x ^ (x >> np.uint64(29))) * _MIX
        return x ^ (x >> np.uint64(32))


def fold(*numbers: int) -> int:
    """One 64-bit key from several whole numbers."""
    key = 0
    for number in numbers:
        mixed = (key ^ (number & _MASK)) * 0x9E3779B97F4A7C15 & _MASK
        mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & _MASK
        key = mixed ^ (mixed >> 32)
    return key


def permute(index: np.ndarray, count: int, key: int, rounds: int = 6) -> np.ndarray:
    """Where a keyed permutation of range(count) sends the integers `index`: a Feistel network on the next even number of bits, walked until
    the result falls below `count`. O(1) memory, any element alone."""
    out = np.asarray(index).astype(np.uint64)
    if count <= 1:
        return out.astype(np.int64)
    half = (int(count - 1).bit_length() + 1) // 2
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    keys = [np.uint64(fold(key, r)) for r in range(rounds)]
    flat = out.reshape(-1)
    todo = np.arange(flat.size)
    while todo.size:
        left, right = flat[todo] >> shift, flat[todo] & low
        for k in keys:
            left, right = right, left ^ (_hash(right, k) & low)
        flat[todo] = (left << shift) | right
        todo = todo[flat[todo] >= np.uint64(count)]
    return flat.reshape(out.shape).astype(np.int64)


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
        for one_lane, one_block in np.unique(np.stack([lane, block]), axis=1).T:
            here = (lane == one_lane) & (block == one_block)
            inside[here] = permute(inside[here], window, fold(self.seed, 1, int(one_lane), int(one_block)))
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
