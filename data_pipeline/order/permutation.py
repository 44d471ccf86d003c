"""The order of one dataset's samples as a pure function of (seed, number of samples, constants, place): no table, no
state but the place.

Samples are numbered over all epochs: the global index of a sample is epoch · N + sample. Consecutive global indices
form chunks of `chunk` samples, and a chunk is read as one byte range. The chunks of an epoch are permuted by a keyed
Feistel network and dealt out to `lanes`, which are independent streams of chunks. Inside a lane, the samples of `block`
chunks are permuted. So lanes · block · chunk samples are in memory at a time, and any process can compute any place of
any lane on its own. The blocks of different lanes begin at different places, so that chunks are requested at an even
rate.

VERSION names this function. Golden vectors in the tests freeze it: a changed function gets a new version, and a run of
another version is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VERSION = 1
_ODD, _MIX, _29, _32 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 29, 32))
_MASK = (1 << 64) - 1
_ROUNDS = 6
_CHUNKS, _BLOCKS = 2, 1  # distinguish the keys of the two permutations
MAX_CHUNK_BYTES, MAX_SHUFFLE_BYTES = 4 << 20, 8 << 30  # of one chunk, and of all samples in memory for shuffling


def _hash(x: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    x = (x ^ key) * _ODD  # uint64 arrays wrap around
    x = (x ^ (x >> _29)) * _MIX
    return x ^ (x >> _32)


def hash_to_key(*numbers: int) -> int:
    """One 64-bit key from several whole numbers."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _hash(key, np.array([number & _MASK], np.uint64))
    return int(key[0])


def permute(index: np.ndarray, count: int | np.ndarray, key: int | np.ndarray, inverse: bool = False) -> np.ndarray:
    """The images of the integers `index` [n] under a keyed permutation of range(count), or under its inverse. `count`,
    `key`: one number, or [n].

    A Feistel network on the next even number of bits, repeated until the result is below `count` (cycle walking). It
    needs O(1) memory, and any element can be computed alone.
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
    """The order in which the lanes yield the `count` samples of a dataset.

    Shuffling keeps lanes · block · chunk samples in memory.
    """

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
        """An order whose chunks and blocks suit the dataset.

        At most half an epoch is in memory at a time, and at most MAX_SHUFFLE_BYTES or 8 batches, whichever is more.
        """
        chunk = max(1, min(cls.chunk, count // (8 * lanes), int(MAX_CHUNK_BYTES / max(1, sample_bytes))))
        in_memory = min(count // 2, max(int(MAX_SHUFFLE_BYTES / max(1, sample_bytes)), 8 * batch * chunk // cls.chunk))
        return cls(count, lanes, seed, shuffle, chunk, max(1, min(cls.block, in_memory // (lanes * chunk))))

    def global_index(self, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The global indices at `place` [n] of `lane` [n].

        The sample is global index % count, its epoch global index // count.
        """
        if not self.shuffle:
            return ((place // self.chunk) * self.lanes + lane) * self.chunk + place % self.chunk
        window = self.block * self.chunk
        shift = lane * self.block // self.lanes * self.chunk  # of the lane's blocks; its first block is shorter by it
        block = (place + shift) // window
        begin = np.maximum(block * window - shift, 0)
        size = np.where(block == 0, window - shift, window)
        key = _hash(
            _hash(lane.astype(np.uint64), np.array(hash_to_key(self.seed, _BLOCKS), np.uint64)), block.astype(np.uint64)
        )
        place = begin + permute(place - begin, size, key)
        return self.shuffled(place // self.chunk * self.lanes + lane) * self.chunk + place % self.chunk

    def block_ends(self, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The first place after the block that contains `place`.

        From there on the chunks of the block are not needed.
        """
        window = self.block * self.chunk if self.shuffle else self.chunk
        shift = lane * self.block // self.lanes * self.chunk if self.shuffle else 0
        return ((place + shift) // window + 1) * window - shift

    def shuffled(self, number: np.ndarray, inverse: bool = False) -> np.ndarray:
        """The chunk that is read at place `number` of the run, or, with `inverse`, the place at which a chunk is read.

        A chunk stays in the epoch of its first sample. A chunk that runs over into the next epoch stays the last one,
        so that no sample is read a third time before every other has been read twice.
        """
        epoch = number * self.chunk // self.count
        low = -(-epoch * self.count // self.chunk)
        inner = (epoch + 1) * self.count // self.chunk - low  # number of chunks that end inside the epoch
        _, first, inside = np.unique(epoch, return_index=True, return_inverse=True)
        keys = np.array([hash_to_key(self.seed, _CHUNKS, int(e)) for e in epoch[first]], np.uint64)
        moved = low + permute(np.minimum(number - low, np.maximum(inner - 1, 0)), inner, keys[inside], inverse)
        return np.where(number - low < inner, moved, number)

    def next_use(self, first: int, epoch: int) -> int:
        """Roughly when sample `first` is read in `epoch`: the place, in its lane, at which the block of its chunk
        begins.
        """
        if not self.shuffle:
            return (epoch * self.count + first) // self.lanes
        number = self.shuffled(np.array([(epoch * self.count + first) // self.chunk]), inverse=True)
        return int(number[0]) // self.lanes // self.block * self.block * self.chunk
