"""The work of a data worker: it makes the micro-batches of one trainer process, by number, and replaces damaged
samples.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.errors import Absent, Damaged, DataError
from data_pipeline.formats.decode_budget import Budget
from data_pipeline.formats.image_formats import WrongChannels
from data_pipeline.order.permutation import hash_to_key
from data_pipeline.order.schedule import Plan
from data_pipeline.shards.dataset import Dataset as Source
from data_pipeline.shards.dataset import Part
from data_pipeline.storage.ranges import READ_ATTEMPTS
from data_pipeline.stream.batch_buffers import BatchBuffers
from data_pipeline.stream.prefetch_client import READ, REREAD, PrefetchClient
from data_pipeline.views.augmentations import Rng, generators

Views = Callable[[dict[str, Any], Rng], dict[str, Any]]
# A remote sample that was corrupt in the same way so many times is stored that way; errors of the network differ.
SAME_DAMAGE_LIMIT = 3
MAX_DAMAGED_IN_A_ROW = 64  # damaged samples in a row before the run ends
# If so many samples in a row have the same wrong number of channels, an option is wrong, and not the data.
MIN_AGREEING_SAMPLES = 3
SLOTS_PER_PLANNING = 4096  # slots that are planned at a time


def collated(views: Views, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Further arrays of a micro-batch, which the views' method `collate` makes from its stacked arrays; {} if they have
    no such method."""
    collate = getattr(views, "collate", None)
    return collate(arrays) if collate is not None else {}


class Batches(Dataset):
    """Item i is this process's part of micro-batch i of the run: i = step · accumulate + micro.

    `topology`: (rank, number of processes, micro-batches of a step).
    """

    def __init__(
        self,
        samples: Sequence[Source],
        plan: Plan,
        views: Views,
        parts: Mapping[str, Part],
        topology: tuple[int, int, int],
    ):
        self.samples, self.plan, self.views, self.parts = samples, plan, views, parts
        self.rank, self.world, self.accumulate = topology
        self.threads, self.buffers = 1, BatchBuffers(1)
        self.budget = Budget()  # limits the bytes of decoded images that the threads hold at once
        self.prefetch: PrefetchClient | None = None  # set when shards are remote
        self._pool: ThreadPoolExecutor | None = None
        self._planned: dict[int, list[tuple[int, int]]] = {}
        self.extensions = tuple(dict.fromkeys(e for part in parts.values() for e in part.extensions))
        self.columns = [s.columns(self.extensions) for s in samples]

    def __getstate__(self) -> dict[str, Any]:
        """For a data worker that is not forked from this process: all but threads and what they have planned."""
        views = {"views": self.views}  # first: it executes the file that a part of the user's own is defined in
        return {**views, **self.__dict__, "_pool": None, "_planned": {}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._batch(index)
        except DataError as error:  # returned as a value: the DataLoader wraps a raised error into a traceback
            return {"error": str(error)}

    def _batch(self, index: int) -> dict[str, Any]:
        step, micro = divmod(index, self.accumulate)
        batch = self.plan.batch(step)
        size = batch // (self.world * self.accumulate)
        first = (self.rank * self.accumulate + micro) * size
        began = time.perf_counter()
        pairs = self._samples_of(index)
        members, counts = self._read(step, pairs)
        read = time.perf_counter()
        bad: list[tuple[str, str, str]] = []
        absent: list[int] = []  # samples that lack a part, once for each time that one was passed over
        tensors: dict[str, Tensor] = {}
        arrays: dict[str, np.ndarray] = {}
        buffer = (0, -1)

        def fill(n: int) -> None:
            slot = {"slot": first + n, "batch": batch, "step": step, "seed": self.plan.seed}
            views = self._sample(*pairs[n], members[n], slot, bad, absent)
            nonlocal tensors, arrays, buffer
            if n == 0:  # the first sample sets the shapes
                tensors, buffer = self.buffers.take(size, views)
                arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            for key, value in views.items():
                arrays[key][n] = value
            members[n] = None  # frees the encoded bytes

        fill(0)
        if self.threads > 1:
            self._pool = self._pool or ThreadPoolExecutor(self.threads)
            list(self._pool.map(fill, range(1, size)))
        else:
            for n in range(1, size):
                fill(n)
        counts["read_us"], counts["views_us"] = int(1e6 * (read - began)), int(1e6 * (time.perf_counter() - read))
        counts["absent"] = len(absent)
        return {**tensors, **self.collated(tensors), "bad": sorted(bad), "counts": dict(counts), "buffer": buffer}

    def collated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`collated` of this process's views, for a micro-batch of tensors on the host."""
        made = collated(self.views, {key: tensor.numpy() for key, tensor in tensors.items()})
        return {key: torch.from_numpy(array) for key, array in made.items()}

    def _samples_of(self, index: int) -> list[tuple[int, int]]:
        """(dataset, global index) of the slots of micro-batch `index`.

        Plans this worker's next micro-batches in the same call, which is cheaper than one at a time.
        """
        if index not in self._planned:
            info = get_worker_info()
            stride = info.num_workers if info else 1
            size = self.plan.batch(index // self.accumulate) // (self.world * self.accumulate)
            indices = index + stride * np.arange(max(1, SLOTS_PER_PLANNING // size))
            self._planned = self.plan.micro_batches(indices, self.accumulate, self.rank, self.world)
        return self._planned.pop(index)

    def _read(self, step: int, pairs: list[tuple[int, int]]) -> tuple[list[Any], Counter[str]]:
        """({column: bytes or Damaged} of each slot, counts of the reads)."""
        if self.prefetch is not None:
            members, counts = self.prefetch.read(_worker(), step, np.array(pairs))
            return [self._checked(*pair, read) for pair, read in zip(pairs, members, strict=True)], Counter(counts)
        members = [self._local(d, global_index) for d, global_index in pairs]
        return members, sum((samples.reader.new_counts() for samples in self.samples), Counter())

    def _local(self, d: int, global_index: int) -> dict[int, bytes | Damaged]:
        try:
            return {**self.samples[d].read_columns(global_index % len(self.samples[d]), self.columns[d])}
        except Damaged as reason:
            return {-1: reason}

    def _single(self, d: int, global_index: int, again: bool = False) -> dict[int, bytes | Damaged]:
        """The members of one sample outside of a batch: of a neighbour, or, with `again`, read once more from the
        store.
        """
        if self.prefetch is None:
            return self._local(d, global_index)
        members = self.prefetch.read(_worker(), 0, np.array([[d, global_index]]), REREAD if again else READ)[0][0]
        return self._checked(d, global_index, members)

    def _checked(self, d: int, global_index: int, members: dict) -> dict[int, Any]:
        return self.samples[d].checked(global_index % len(self.samples[d]), members)

    def _sample(self, d: int, global_index: int, members: dict, slot: dict, bad: list, absent: list) -> dict[str, Any]:
        """The views of a slot's sample or, when that is damaged, of the next usable sample of its chunk."""
        members = self._read_until_agreed(d, global_index, members)
        channels: list[int] = []  # of the samples tried so far that were refused for their number of channels alone
        for tried, other in zip(
            range(MAX_DAMAGED_IN_A_ROW), _neighbours(global_index, self.plan.orders[d].chunk), strict=False
        ):
            if tried:
                members = self._read_until_agreed(d, other, self._single(d, other))
            try:
                return self._views(d, other, members, slot)
            except Absent as reason:
                last = ("", f"sample {other % len(self.samples[d])}", str(reason))
                absent.append(other % len(self.samples[d]))
            except Damaged as reason:
                number = other % len(self.samples[d])
                name = self.prefetch.name(_worker(), d, other) if self.prefetch else self.samples[d].name(number)
                bad.append(last := (*name, str(reason)))
                channels += [reason.stored] if isinstance(reason, WrongChannels) else []
                if tried + 1 == len(channels) == MIN_AGREEING_SAMPLES and len(set(channels)) == 1:
                    raise DataError(
                        f"{name[1]} in {name[0]}, like its neighbours, {reason}; write model.in_channels={channels[0]},"
                        f" and {channels[0]} values each for data.mean and data.std"
                    ) from None
        shard = f" of {last[0]}" if last[0] else ""
        raise DataError(
            f"{self.samples[d].names}: {MAX_DAMAGED_IN_A_ROW} damaged samples in a row, the last {last[1]}{shard}:"
            f" {last[2]}"
        )

    def _read_until_agreed(self, d: int, global_index: int, members: dict) -> dict[int, bytes | Damaged]:
        """The members of a sample, read again while a hash is wrong, until they were wrong in the same way
        `SAME_DAMAGE_LIMIT` times.
        """
        seen: Counter[str] = Counter()
        for _ in range(READ_ATTEMPTS if self.prefetch else 0):
            if (wrong := _first_damage(members)) is None:
                break
            seen[str(wrong)] += 1
            if seen[str(wrong)] == SAME_DAMAGE_LIMIT:
                break
            members = self._single(d, global_index, again=True)
        return members

    def _views(self, d: int, global_index: int, members: dict, slot: dict) -> dict[str, Any]:
        if wrong := _first_damage(members):
            raise wrong
        epoch, number = divmod(global_index, len(self.samples[d]))
        sample = self.samples[d].sample(number, members, self.parts)
        sample |= slot | {"id": number, "epoch": epoch, "dataset": d}
        with self.budget.lease() as take:
            for value in sample.values():
                if hasattr(value, "reserve"):  # an `Encoded`, which is decoded when the views ask for its pixels
                    value.reserve = take
            return {"id": number, **self.views(sample, generators((_key(self.plan.seed, d, epoch), number)))}


def _first_damage(members: dict[int, bytes | Damaged]) -> Damaged | None:
    return next((m for m in members.values() if isinstance(m, Damaged)), None)


def _neighbours(global_index: int, chunk: int) -> Iterator[int]:
    """The global index itself, then the others of its chunk in turn, then those after the chunk."""
    begin = global_index // chunk * chunk
    for k in range(chunk):
        yield begin + (global_index - begin + k) % chunk
    yield from range(begin + chunk, begin + chunk + MAX_DAMAGED_IN_A_ROW)


def _worker() -> int:
    """The number of this data worker; 0 outside of one."""
    info = get_worker_info()
    return info.id if info else 0


_key = functools.lru_cache(64)(hash_to_key)  # one key serves all samples of an epoch
