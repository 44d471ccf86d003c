"""The order of one dataset's samples as a pure function of (seed, number of samples, constants, lane, place). There is
no table, and no state but the place: the number of a sample in its lane.

Samples are numbered over all epochs: the global index of a sample is epoch · N + sample. Consecutive global indices
form chunks of `chunk` samples, and a chunk is read as one byte range. The chunks of an epoch are permuted by a keyed
Feistel network and distributed over `lanes`, which are independent streams of chunks. Inside a lane, the samples of `block`
chunks are permuted. So lanes · block · chunk samples are in memory at a time, and any process can compute any place of
any lane alone. The blocks of different lanes begin at different places, so that chunks are requested at an even
rate.

VERSION names this function. Golden vectors in the tests freeze it: a changed function gets a new version, and a run of
another version is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VERSION = 1
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))
_MASK_64_BITS = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
_CHUNK_KEYS, _BLOCK_KEYS = 2, 1  # hashed into the keys of the two permutations, so that these differ
MAX_CHUNK_BYTES = 4 << 20
MAX_SHUFFLE_BYTES = 8 << 30  # of all samples in memory for shuffling


def _hash(x: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """A hash of uint64 arrays, as in the finaliser of SplitMix64."""
    x = (x ^ key) * _MULTIPLIERS[0]  # uint64 arrays wrap around
    x = (x ^ (x >> np.uint64(29))) * _MULTIPLIERS[1]
    return x ^ (x >> np.uint64(32))


def hash_to_key(*numbers: int) -> int:
    """A 64-bit key from several integers."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _hash(key, np.array([number & _MASK_64_BITS], np.uint64))
    return int(key[0])


def permute(index: np.ndarray, count: int | np.ndarray, key: int | np.ndarray, inverse: bool = False) -> np.ndarray:
    """Map the integers `index` [n] by a keyed permutation of range(count), or by its inverse. `count` and `key` are one
    number, or arrays [n].

    The permutation is a Feistel network on the next even number of bits, applied again to a result that is not below
    `count` (cycle walking). It needs O(1) memory, and any element can be computed alone.
    """
    out = np.array(index, np.uint64)
    counts = np.broadcast_to(np.asarray(count, np.uint64), out.shape)
    half = ((np.ceil(np.log2(np.maximum(counts, 2))) + 1) // 2).astype(np.uint64)  # bits of each half
    keys = np.broadcast_to(np.array(key, np.uint64), out.shape)
    rounds = range(_FEISTEL_ROUNDS)[::-1] if inverse else range(_FEISTEL_ROUNDS)
    todo = np.flatnonzero(counts > 1)
    while todo.size:
        shift, todo_keys = half[todo], keys[todo]
        low = (np.uint64(1) << shift) - np.uint64(1)
        left, right = out[todo] >> shift, out[todo] & low
        if inverse:
            left, right = right, left
        for r in rounds:
            left, right = right, left ^ (_hash(right, _hash(todo_keys, np.uint64(r))) & low)
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
        """An order whose chunks and blocks suit a dataset of `count` samples of `sample_bytes` each.

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
        window = self.block * self.chunk  # samples in a block
        shift = self._block_shift(lane)
        block = (place + shift) // window  # [n], as all arrays below
        begin = np.maximum(block * window - shift, 0)
        size = np.where(block == 0, window - shift, window)
        lane_key = _hash(lane.astype(np.uint64), np.array(hash_to_key(self.seed, _BLOCK_KEYS), np.uint64))
        key = _hash(lane_key, block.astype(np.uint64))
        place = begin + permute(place - begin, size, key)
        return self.shuffled(place // self.chunk * self.lanes + lane) * self.chunk + place % self.chunk

    def _block_shift(self, lane: np.ndarray) -> np.ndarray:
        """How many samples earlier the blocks of each lane [n] begin than those of lane 0. The first block of a lane is
        shorter by as many samples."""
        return lane * self.block // self.lanes * self.chunk

    def block_ends(self, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The first places [n] after the blocks that contain `place` [n] of `lane` [n].

        From there on the chunks of the block are not needed. Without shuffling, each chunk is a block.
        """
        if not self.shuffle:
            return (place // self.chunk + 1) * self.chunk
        window, shift = self.block * self.chunk, self._block_shift(lane)
        return ((place + shift) // window + 1) * window - shift

    def shuffled(self, number: np.ndarray, inverse: bool = False) -> np.ndarray:
        """The chunks that come at positions `number` [n] in the order of all chunks, or, with `inverse`, the positions
        of chunks.

        A chunk stays in the epoch of its first sample. A chunk that continues in the next epoch stays the last one of
        its epoch, so that no sample is read a third time before every other has been read twice.
        """
        epoch = number * self.chunk // self.count
        first = -(-epoch * self.count // self.chunk)  # the first chunk that begins in the epoch
        inner = (epoch + 1) * self.count // self.chunk - first  # number of chunks that end inside the epoch
        epochs, row = np.unique(epoch, return_inverse=True)
        keys = np.array([hash_to_key(self.seed, _CHUNK_KEYS, int(e)) for e in epochs], np.uint64)
        last_inner = np.maximum(inner - 1, 0)
        moved = first + permute(np.minimum(number - first, last_inner), inner, keys[row], inverse)
        return np.where(number - first < inner, moved, number)

    def next_use(self, first: int, epoch: int) -> int:
        """Approximately the place, in its lane, at which sample `first` is read in `epoch`: where the block of its
        chunk begins.
        """
        if not self.shuffle:
            return (epoch * self.count + first) // self.lanes
        position = self.shuffled(np.array([(epoch * self.count + first) // self.chunk]), inverse=True)
        return int(position[0]) // self.lanes // self.block * self.block * self.chunk
