"""What a data worker does: it makes micro-batches of one trainer process, each from its number alone, and replaces
damaged samples.

In this file `d` is the number of a dataset, and `members` are the members of one sample: {index column: bytes, or a
Damaged exception if they could not be read}.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from common.errors import Absent, Damaged, DataError
from data_pipeline.formats.decode_budget import Budget
from data_pipeline.formats.image_formats import Unsuitable
from data_pipeline.order.budget import AnyPlan
from data_pipeline.order.permutation import hash_to_key
from data_pipeline.shards.dataset import Dataset as Source
from data_pipeline.shards.dataset import Part
from data_pipeline.storage.ranges import READ_ATTEMPTS
from data_pipeline.stream.batch_buffers import BatchBuffers
from data_pipeline.stream.prefetch_client import READ, REREAD, PrefetchClient
from data_pipeline.views.augmentations import Rng, generators

Views = Callable[[dict[str, Any], Rng], dict[str, Any]]
# Reads with the same wrong content after which a remote sample counts as damaged in the store. Errors of the network
# differ from read to read.
SAME_DAMAGE_LIMIT = 3
MAX_DAMAGED_IN_A_ROW = 64  # consecutive damaged samples after which the run ends
# If so many consecutive samples have the same number of channels, and not the expected one, the recipe is wrong.
MIN_AGREEING_SAMPLES = 3
SLOTS_PER_PLANNING = 4096  # slots whose samples are computed in one call


def collated(views: Views, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The further arrays of a micro-batch that `views.collate` makes from its stacked arrays; {} if the views have no
    method `collate`."""
    collate = getattr(views, "collate", None)
    return collate(arrays) if collate is not None else {}


class Batches(Dataset):
    """Item i is this process's part of micro-batch i of the run: i = step · accumulate + micro.

    `topology`: (rank, number of processes, micro-batches per step).
    """

    def __init__(
        self,
        samples: Sequence[Source],
        plan: AnyPlan,
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
        self.lengths = list(map(len, samples))

    def __getstate__(self) -> dict[str, Any]:
        """The state for a data worker that is not forked from this process: everything but threads and plans."""
        # The views are unpickled first, because that executes the user's objective file, which may define the parts.
        views = {"views": self.views}
        return {**views, **self.__dict__, "_pool": None, "_planned": {}}

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._batch(index)
        except DataError as error:  # returned as a value: the DataLoader wraps a raised error into a traceback
            return {"error": str(error)}

    def _batch(self, index: int) -> dict[str, Any]:
        """The tensors of a micro-batch, and about them "bad", "counts" and "buffer"."""
        step, micro = divmod(index, self.accumulate)
        batch, facts = self.plan.batch(step), self.plan.facts(step)
        first, last = self.plan.share(step, self.rank * self.accumulate + micro, self.world * self.accumulate)
        size = last - first
        start = time.perf_counter()
        pairs = self._samples_of(index)
        members, counts = self._read(step, pairs)
        read_end = time.perf_counter()
        bad: list[tuple[str, str, str]] = []  # (shard, key, reason) of damaged samples
        absent: list[int] = []  # samples that were skipped because they lack a part; repeated if skipped repeatedly

        def views_of(n: int) -> dict[str, Any]:
            slot = {"slot": first + n, "batch": batch, "step": step, "seed": self.plan.seed, **facts}
            views = self._usable_views(*pairs[n], members[n], slot, bad, absent)
            members[n] = None  # frees the encoded bytes
            return views

        def store(n: int, views: dict[str, Any]) -> None:
            for key, value in views.items():
                arrays[key][n] = value

        first_views = views_of(0)  # determines the shapes of the micro-batch
        tensors, buffer = self.buffers.take(size, first_views)
        arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
        store(0, first_views)
        if self.threads > 1:
            self._pool = self._pool or ThreadPoolExecutor(self.threads)
            list(self._pool.map(lambda n: store(n, views_of(n)), range(1, size)))
        else:
            for n in range(1, size):
                store(n, views_of(n))
        counts["read_us"] = int(1e6 * (read_end - start))
        counts["views_us"] = int(1e6 * (time.perf_counter() - read_end))
        counts["absent"] = len(absent)
        return {**tensors, **self.collated(tensors), "bad": sorted(bad), "counts": dict(counts), "buffer": buffer}

    def collated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The further tensors that the views make from a micro-batch of tensors on the host; see `collated`."""
        made = collated(self.views, {key: tensor.numpy() for key, tensor in tensors.items()})
        return {key: torch.from_numpy(array) for key, array in made.items()}

    def _samples_of(self, index: int) -> list[tuple[int, int]]:
        """(dataset, global index) of the slots of micro-batch `index`.

        The next micro-batches of this worker are planned in the same call, which is cheaper than one at a time.
        """
        if index not in self._planned:
            info = get_worker_info()
            stride = info.num_workers if info else 1
            size = max(1, self.plan.batch(index // self.accumulate) // (self.world * self.accumulate))
            indices = index + stride * np.arange(max(1, SLOTS_PER_PLANNING // size))
            self._planned = self.plan.micro_batches(indices, self.accumulate, self.rank, self.world)
        return self._planned.pop(index)

    def _read(self, step: int, pairs: list[tuple[int, int]]) -> tuple[list[Any], Counter[str]]:
        """(members of each slot's sample, counts of the reads)."""
        if self.prefetch is not None:
            members, counts = self.prefetch.read(_worker(), step, np.array(pairs))
            return [self._checked(*pair, read) for pair, read in zip(pairs, members, strict=True)], Counter(counts)
        members = [self._read_local(d, global_index) for d, global_index in pairs]
        return members, sum((samples.reader.new_counts() for samples in self.samples), Counter())

    def _read_local(self, d: int, global_index: int) -> dict[int, bytes | Damaged]:
        """The members of a sample, read in this process."""
        try:
            return {**self.samples[d].read_columns(global_index % self.lengths[d], self.columns[d])}
        except Damaged as reason:
            return {-1: reason}

    def _read_single(self, d: int, global_index: int, again: bool = False) -> dict[int, bytes | Damaged]:
        """The members of one sample that was not read with its batch. With `again`, they are read from the store and
        not from any cache."""
        if self.prefetch is None:
            return self._read_local(d, global_index)
        members = self.prefetch.read(_worker(), 0, np.array([[d, global_index]]), REREAD if again else READ)[0][0]
        return self._checked(d, global_index, members)

    def _checked(self, d: int, global_index: int, members: dict) -> dict[int, Any]:
        """Members from the prefetch server, after the checks of the dataset."""
        return self.samples[d].checked(global_index % self.lengths[d], members)

    def _usable_views(
        self, d: int, global_index: int, members: dict, slot: dict, bad: list, absent: list
    ) -> dict[str, Any]:
        """The views of a slot's sample or, if it is damaged or lacks a part, of the next usable sample of its chunk or of
        its bucket.

        Appends (shard, key, reason) of each damaged sample to `bad`, and each sample that lacks a part to `absent`.
        """
        advice: list[str] = []  # of the samples that can be read, but not as requested
        candidates = itertools.islice(self.plan.neighbours(d, global_index), MAX_DAMAGED_IN_A_ROW)
        for tried, candidate in enumerate(candidates):
            if candidate != global_index:
                members = self._read_single(d, candidate)
            members = self._read_until_agreed(d, candidate, members)
            number = candidate % self.lengths[d]
            try:
                return self._make_views(d, candidate, members, slot)
            except Absent as reason:
                absent.append(number)
                shard, key, last_reason = "", f"sample {number}", str(reason)
            except Damaged as reason:
                shard, key = (
                    self.prefetch.name(_worker(), d, candidate) if self.prefetch else self.samples[d].name(number)
                )
                last_reason = str(reason)
                bad.append((shard, key, last_reason))
                if isinstance(reason, Unsuitable):
                    advice.append(reason.advice)
                all_agree = tried + 1 == len(advice) and len(set(advice)) == 1
                if all_agree and len(advice) == MIN_AGREEING_SAMPLES:
                    raise DataError(f"{key} in {shard}, like its neighbours, {reason}; {advice[0]}") from None
        raise DataError(
            f"{self.samples[d].names}: {MAX_DAMAGED_IN_A_ROW} damaged samples in a row, the last"
            f" {key}{f' of {shard}' if shard else ''}: {last_reason}"
        )

    def _read_until_agreed(self, d: int, global_index: int, members: dict) -> dict[int, bytes | Damaged]:
        """The members of a sample. While one is damaged, a remote sample is read again, until `SAME_DAMAGE_LIMIT` reads
        gave the same damage."""
        seen: Counter[str] = Counter()
        for _ in range(READ_ATTEMPTS if self.prefetch else 0):
            damage = _first_damage(members)
            if damage is None:
                break
            seen[str(damage)] += 1
            if seen[str(damage)] == SAME_DAMAGE_LIMIT:
                break
            members = self._read_single(d, global_index, again=True)
        return members

    def _make_views(self, d: int, global_index: int, members: dict, slot: dict) -> dict[str, Any]:
        """The views of a sample. Raises Damaged, also (as Absent) if it lacks a part."""
        if damage := _first_damage(members):
            raise damage
        epoch, number = divmod(global_index, self.lengths[d])
        sample = self.samples[d].sample(number, members, self.parts)
        sample |= slot | {"id": number, "epoch": epoch, "dataset": d}
        with self.budget.lease() as take:
            for value in sample.values():
                if hasattr(value, "reserve"):  # an `Encoded`, which is decoded when the views call `pixels`
                    value.reserve = take
            return {"id": number, **self.views(sample, generators((_key(self.plan.seed, d, epoch), number)))}


def _first_damage(members: dict[int, bytes | Damaged]) -> Damaged | None:
    """The exception of the first damaged member of a sample; None if no member is damaged."""
    return next((m for m in members.values() if isinstance(m, Damaged)), None)


def _worker() -> int:
    """The number of this data worker; 0 outside of one."""
    info = get_worker_info()
    return info.id if info else 0


_key = functools.lru_cache(64)(hash_to_key)  # cached, because all samples of an epoch have the same key
