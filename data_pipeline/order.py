"""The order of one dataset's samples as a pure function of (seed, number of samples, constants, place): no table, no state but the place.

Reading never ends: virtual ids v = epoch · N + sample. They are cut into chunks of `chunk` consecutive ids, each one range read. The chunks of an
epoch are permuted by a keyed Feistel network and dealt out to `lanes`, independent streams of chunks; inside a lane, the samples of `block`
chunks are permuted. So lanes · block · chunk samples are held at a time, and any process can compute any place of any lane on its own.
The blocks of the lanes begin at different places, so that chunks are asked for at an even rate.

VERSION names this function. Golden vectors in the tests freeze it: a change is a new version, and a run of another version is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VERSION = 1
_ODD, _MIX, _29, _32 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 29, 32))
_MASK = (1 << 64) - 1
_ROUNDS = 6
_CHUNKS, _BLOCKS = 2, 1  # what a key is for
MAX_CHUNK, MAX_HELD = 4 << 20, 8 << 30  # bytes: of one chunk, and of all that is held for shuffling


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


def permute(index: np.ndarray, count: int | np.ndarray, key: int | np.ndarray, inverse: bool = False) -> np.ndarray:
    """Where a keyed permutation of range(count) sends the integers `index` [n], or whence they come; `count`, `key`: one for all, or one each [n].

    A Feistel network on the next even number of bits, walked until the result falls below `count`: O(1) memory, any element alone.
    """
    out = np.array(index, np.uint64)
    counts = np.broadcast_to(np.asarray(count, np.uint64), out.shape)
    half = ((np.ceil(np.log2(np.maximum(counts, 2))) + 1) // 2).astype(np.uint64)  # bits of each half
    keys = np.broadcast_to(np.array(key, np.uint64), out.shape)
    rounds = range(_ROUNDS - 1, -1, -1) if inverse else range(_ROUNDS)
    todo = np.flatnonzero(counts > 1)
    while todo.size:
        shift, key_here = half[todo], keys[todo]
        low = (np.uint64(1) << shift) - np.uint64(1)
        left, right = out[todo] >> shift, out[todo] & low
        if inverse:
            left, right = right, left
        for r in rounds:
            left, right = right, left ^ (_hash(right, _hash(key_here, np.uint64(r))) & low)
        if inverse:
            left, right = right, left
        out[todo] = (left << shift) | right
        todo = todo[out[todo] >= counts[todo]]
    return out.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which samples the lanes give. `count` samples; memory for shuffling: lanes · block · chunk of them."""

    count: int
    lanes: int
    seed: int = 0
    shuffle: bool = True
    chunk: int = 16
    block: int = 32

    @classmethod
    def of(
        cls, count: int, lanes: int, seed: int = 0, shuffle: bool = True, sample_bytes: float = 0, batch: int = 0
    ) -> Order:
        """With chunks and blocks so small that at most half an epoch is held at a time, and MAX_HELD bytes or, if that is more, 8 batches."""
        chunk = max(1, min(cls.chunk, count // (8 * lanes), int(MAX_CHUNK / max(1, sample_bytes))))
        held = min(count // 2, max(int(MAX_HELD / max(1, sample_bytes)), 8 * batch * chunk // cls.chunk))
        return cls(count, lanes, seed, shuffle, chunk, max(1, min(cls.block, held // (lanes * chunk))))

    def virtual(self, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Virtual ids at `place` [n] of `lane` [n]; a sample is virtual id % count, of epoch virtual id // count."""
        if not self.shuffle:
            return ((place // self.chunk) * self.lanes + lane) * self.chunk + place % self.chunk
        window = self.block * self.chunk
        ahead = (
            lane * self.block // self.lanes * self.chunk
        )  # how far the lane's blocks are shifted: its first one is shorter
        block = (place + ahead) // window
        begin = np.maximum(block * window - ahead, 0)
        size = np.where(block == 0, window - ahead, window)
        key = _hash(
            _hash(lane.astype(np.uint64), np.array(fold(self.seed, _BLOCKS), np.uint64)), block.astype(np.uint64)
        )
        place = begin + permute(place - begin, size, key)
        return self.shuffled(place // self.chunk * self.lanes + lane) * self.chunk + place % self.chunk

    def block_ends(self, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The first place after the block that holds `place`: chunks of the block are not needed from there on."""
        window = self.block * self.chunk if self.shuffle else self.chunk
        ahead = lane * self.block // self.lanes * self.chunk if self.shuffle else 0
        return ((place + ahead) // window + 1) * window - ahead

    def shuffled(self, number: np.ndarray, inverse: bool = False) -> np.ndarray:
        """The chunk that stands at place `number` of the run, or the place of a chunk; chunks move inside the epoch of their first sample.

        The chunk that runs over into the next epoch stays last, so that no sample comes a third time before another has come twice.
        """
        epoch = number * self.chunk // self.count
        low = -(-epoch * self.count // self.chunk)
        whole = (epoch + 1) * self.count // self.chunk - low  # chunks that end inside the epoch
        _, first, inside = np.unique(epoch, return_index=True, return_inverse=True)
        keys = np.array([fold(self.seed, _CHUNKS, int(e)) for e in epoch[first]], np.uint64)
        moved = low + permute(np.minimum(number - low, np.maximum(whole - 1, 0)), whole, keys[inside], inverse)
        return np.where(number - low < whole, moved, number)

    def next_use(self, first: int, epoch: int) -> int:
        """About when sample `first` comes in `epoch`: the place, in any lane, where the block of its chunk begins."""
        if not self.shuffle:
            return (epoch * self.count + first) // self.lanes
        number = self.shuffled(np.array([(epoch * self.count + first) // self.chunk]), inverse=True)
        return int(number[0]) // self.lanes // self.block * self.block * self.chunk
