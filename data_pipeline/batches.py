"""What a data worker does: the micro-batches of one process, by number, with damaged samples replaced in place."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data_pipeline.decode import Damaged
from data_pipeline.order import fold
from data_pipeline.plan import Plan
from data_pipeline.remote import AGAIN, READ, Bytes
from data_pipeline.rows import Rows
from data_pipeline.shards import LOOKS, Look, Samples
from data_pipeline.slabs import Slabs
from data_pipeline.storage import DataError
from data_pipeline.views import Rng, generators

Views = Callable[[dict[str, Any], Rng], dict[str, Any]]
SURE = 3  # times that a remote sample is wrong in the same way: then the store itself holds it so, as the way changes other bytes each time
TRIES = 64  # damaged samples in a row before the data is given up
PLANNED = 4096  # slots that are planned at a time


class Batches(Dataset):
    """Item i is micro-batch i of the run, of this process: i = step · accumulate + micro."""

    def __init__(
        self, samples: Sequence[Samples | Rows], plan: Plan, views: Views, look: Look, spread: tuple[int, int, int]
    ):
        self.samples, self.plan, self.views, self.look = samples, plan, views, look
        self.rank, self.world, self.accumulate = spread
        self.threads, self.slabs = 1, Slabs(1)
        self.feeder: Bytes | None = None  # where shards are remote: the way to the feeder
        self._pool: ThreadPoolExecutor | None = None
        self._planned: dict[int, list[tuple[int, int]]] = {}
        self.columns = [s.columns(look.extensions) for s in samples]

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._batch(index)
        except DataError as error:  # as a value: from a worker it would come wrapped in a traceback
            return {"error": str(error)}

    def _batch(self, index: int) -> dict[str, Any]:
        step, micro = divmod(index, self.accumulate)
        batch = self.plan.batch(step)
        size = batch // (self.world * self.accumulate)
        first = (self.rank * self.accumulate + micro) * size
        began = time.perf_counter()
        pairs = self._pairs(index)
        members, counts = self._read(step, pairs)
        read = time.perf_counter()
        bad: list[tuple[str, str, str]] = []
        tensors: dict[str, Tensor] = {}
        arrays: dict[str, np.ndarray] = {}
        slab = (0, -1)

        def fill(n: int) -> None:
            about = {"slot": first + n, "batch": batch, "step": step, "seed": self.plan.seed}
            part = self._sample(*pairs[n], members[n], about, bad)
            nonlocal tensors, arrays, slab
            if n == 0:  # gives the shapes
                tensors, slab = self.slabs.take(size, part)
                arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            for key, value in part.items():
                arrays[key][n] = value
            members[n] = None  # the encoded bytes are not needed any more

        fill(0)
        if self.threads > 1:
            self._pool = self._pool or ThreadPoolExecutor(self.threads)
            list(self._pool.map(fill, range(1, size)))
        else:
            for n in range(1, size):
                fill(n)
        counts["read_us"], counts["views_us"] = int(1e6 * (read - began)), int(1e6 * (time.perf_counter() - read))
        return {**tensors, "bad": sorted(bad), "counts": dict(counts), "slab": slab}

    def _pairs(self, index: int) -> list[tuple[int, int]]:
        """(dataset, virtual id) of the slots of micro-batch `index`; planned for this worker's next ones at the same time, which is cheaper."""
        if index not in self._planned:
            info = get_worker_info()
            stride = info.num_workers if info else 1
            size = self.plan.batch(index // self.accumulate) // (self.world * self.accumulate)
            indices = index + stride * np.arange(max(1, PLANNED // size))
            self._planned = self.plan.micro_batches(indices, self.accumulate, self.rank, self.world)
        return self._planned.pop(index)

    def _read(self, step: int, pairs: list[tuple[int, int]]) -> tuple[list[Any], Counter[str]]:
        """({column: bytes or Damaged} of each slot, counts)."""
        if self.feeder is not None:
            members, counts = self.feeder.read(_worker(), step, np.array(pairs))
            return [self._checked(*pair, held) for pair, held in zip(pairs, members, strict=True)], Counter(counts)
        members = [self._local(d, virtual) for d, virtual in pairs]
        return members, sum((samples.fetcher.new_counts() for samples in self.samples), Counter())

    def _local(self, d: int, virtual: int) -> dict[int, bytes | Damaged]:
        try:
            return {**self.samples[d].read_columns(virtual % len(self.samples[d]), self.columns[d])}
        except Damaged as reason:
            return {-1: reason}

    def _one(self, d: int, virtual: int, again: bool = False) -> dict[int, bytes | Damaged]:
        """One sample outside of a batch: a neighbour, or a second look."""
        if self.feeder is None:
            return self._local(d, virtual)
        members = self.feeder.read(_worker(), 0, np.array([[d, virtual]]), AGAIN if again else READ)[0][0]
        return self._checked(d, virtual, members)

    def _checked(self, d: int, virtual: int, members: dict) -> dict[int, Any]:
        return self.samples[d].checked(virtual % len(self.samples[d]), members)

    def _sample(self, d: int, virtual: int, members: dict, about: dict, bad: list) -> dict[str, Any]:
        """A slot's part of the batch, from its own sample or, where that is damaged, from the next one of its chunk."""
        members = self._look_again(d, virtual, members)
        for tried, other in zip(range(TRIES), _neighbours(virtual, self.plan.orders[d].chunk), strict=False):
            if tried:
                members = self._look_again(d, other, self._one(d, other))
            try:
                return self._views(d, other, members, about)
            except Damaged as reason:
                number = other % len(self.samples[d])
                name = self.feeder.name(_worker(), d, other) if self.feeder else self.samples[d].name(number)
                bad.append((*name, str(reason)))
        raise DataError(
            f"{self.samples[d].names}: {TRIES} damaged samples in a row, the last {bad[-1][1]} of {bad[-1][0]}: {bad[-1][2]}"
        )

    def _look_again(self, d: int, virtual: int, members: dict) -> dict[int, bytes | Damaged]:
        """Members with a wrong hash, asked for anew until they are right, or have been wrong in the same way `SURE` times."""
        seen: Counter[str] = Counter()
        for _ in range(LOOKS if self.feeder else 0):
            if (wrong := _first_damage(members)) is None:
                break
            seen[str(wrong)] += 1
            if seen[str(wrong)] == SURE:
                break
            members = self._one(d, virtual, again=True)
        return members

    def _views(self, d: int, virtual: int, members: dict, about: dict) -> dict[str, Any]:
        if wrong := _first_damage(members):
            raise wrong
        epoch, number = divmod(virtual, len(self.samples[d]))
        sample = self.samples[d].sample(number, members, self.look)
        sample |= about | {"id": number, "epoch": epoch, "dataset": d, "color": self.look.color}
        return {"id": number, **self.views(sample, generators((_key(self.plan.seed, d, epoch), number)))}


def _first_damage(members: dict[int, bytes | Damaged]) -> Damaged | None:
    return next((m for m in members.values() if isinstance(m, Damaged)), None)


def _neighbours(virtual: int, chunk: int) -> Iterator[int]:
    """The virtual id itself, the others of its chunk in turn, then those that follow."""
    begin = virtual // chunk * chunk
    for k in range(chunk):
        yield begin + (virtual - begin + k) % chunk
    yield from range(begin + chunk, begin + chunk + TRIES)


def _worker() -> int:
    info = get_worker_info()
    return info.id if info else 0


_key = functools.lru_cache(64)(fold)  # the same for all samples of an epoch
