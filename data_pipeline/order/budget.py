"""Batches by budget: the plan of a run whose batches are limited by the total length of their samples, not by their
number, as a pure function of the step.

    the samples, sorted by length, are divided into buckets, so that an epoch has as few steps as possible
    bucket b: N_b samples of at most L_b; a batch has at most ⌊budget / L_b⌋ of them, padded to L_b, so that an epoch of
        the bucket has K_b = ⌈N_b / ⌊budget / L_b⌋⌉ batches, whose sizes differ by at most one
    an epoch has K = Σ K_b steps; in each epoch, the samples of every bucket are permuted before they are cut into
        batches, and the batches of all buckets are permuted

So each sample is used exactly once in an epoch, and no batch is larger than the budget. The parts of a batch that the
ranks and micro-batches get differ by at most one sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from common.errors import DataError
from data_pipeline.order.permutation import VERSION, hash_to_key, permute
from data_pipeline.order.schedule import Phase, Plan, Slots

MIN_BATCHES = 2  # of a bucket in an epoch, so that its samples are in other batches in every epoch
CANDIDATES = 128  # lengths among which the limits of the buckets are chosen
PADDING_COST = 0.01  # of a batch of padding, relative to a step
GRID = 100  # the lengths of buckets are multiples of 1 / GRID
_STEP_KEYS, _SAMPLE_KEYS = 3, 4  # hashed into the keys of the two permutations, so that these differ


@dataclass(frozen=True)
class BatchBudget:
    """The limits of a batch, in the unit of the lengths: seconds."""

    size: float  # the largest total length, with padding
    longest: float  # a longer sample is cut to this length
    buckets: int = 16  # the largest number of buckets


@dataclass(frozen=True)
class _Bucket:
    """Samples of similar lengths: their numbers, the length to which they are padded, and the batches of an epoch."""

    samples: np.ndarray  # int64 [N_b], ascending
    length: float  # L_b
    batches: int  # K_b

    def first(self, batch: int) -> int:
        """The number of the bucket's samples that come before a batch in an epoch."""
        return len(self.samples) * batch // self.batches


def make_buckets(lengths: np.ndarray, budget: BatchBudget) -> list[_Bucket]:
    """The buckets of samples with these lengths [N]. Raises DataError if the longest sample exceeds the budget."""
    lengths = np.minimum(np.ceil(np.round(lengths * GRID, 3)) / GRID, budget.longest)
    lengths = np.maximum(lengths, 1 / GRID)
    longest = float(lengths.max())
    if longest > budget.size:
        raise DataError(
            f"data.batch = {{seconds: {budget.size:g}}}: the longest recording has {longest:g} s, so that no batch can"
            f" hold it; write {longest:g} or more, or a smaller data.seconds"
        )
    # the longest samples of the buckets are among C lengths, between which the total length is about the same
    ordered = np.sort(lengths)
    totals = np.cumsum(ordered)
    places = np.searchsorted(totals, totals[-1] * np.arange(1, CANDIDATES + 1) / CANDIDATES)
    candidates = np.unique(ordered[np.minimum(places, len(ordered) - 1)])  # [C]
    before = np.concatenate([[0], np.searchsorted(ordered, candidates, "right")])  # samples up to each candidate
    counts = before[None, 1:] - before[:, None]  # [C + 1, C]: N of a bucket from each candidate to each one
    batches = -(-counts // _per_batch(budget, candidates))
    cost = batches + PADDING_COST * counts * candidates / budget.size
    allowed = np.arange(len(before))[:, None] <= np.arange(len(candidates))
    cost = np.where(allowed & (batches >= MIN_BATCHES), cost, np.inf)
    cost[0, -1] = batches[0, -1] + 1  # one bucket for all samples is always possible
    limits = candidates[_cheapest_ends(cost, budget.buckets)]
    out = []
    for low, high in itertools.pairwise([-np.inf, *limits.tolist()]):
        samples = np.flatnonzero((lengths > low) & (lengths <= high))
        out.append(_Bucket(samples, high, -(-len(samples) // int(_per_batch(budget, np.array(high))))))
    return out


def _per_batch(budget: BatchBudget, length: np.ndarray) -> np.ndarray:
    """⌊budget / L⌋: the samples of length L that a batch holds."""
    return (budget.size / length + 1e-9).astype(np.int64)


def _cheapest_ends(cost: np.ndarray, most: int) -> list[int]:
    """The columns at which the buckets of the cheapest division into at most `most` buckets end, ascending. `cost`
    [C + 1, C]: that of a bucket that begins after the candidate before each row, and ends at each column."""
    best, ways = np.full(len(cost), np.inf), [np.zeros(0, np.int64)]  # of the samples before each row
    best[0] = 0
    totals = []
    for _ in range(min(most, cost.shape[1])):
        sums = best[:, None] + cost
        ways.append(sums.argmin(0))
        best = np.concatenate([[np.inf], sums.min(0)])
        totals.append(best[-1])
    count, end, ends = int(np.argmin(totals)) + 1, cost.shape[1], list[int]()
    for way in ways[count:0:-1]:
        ends.insert(0, end - 1)
        end = int(way[end - 1])
    return ends


class BudgetPlan:
    """The plan of a run on one dataset whose samples have `lengths` [N]; the methods are those of `Plan`.

    `names`: the dataset in messages. Raises DataError if a sample is longer than the budget.
    """

    def __init__(self, lengths: np.ndarray, budget: BatchBudget, seed: int = 0, shuffle: bool = True, names: str = ""):
        self.lengths, self.budget, self.seed, self.shuffle, self.names = lengths, budget, seed, shuffle, names
        self.buckets = make_buckets(lengths, budget)
        # the first batch of each bucket among all batches of an epoch, and after the last one their number, K
        self._first_batch = np.cumsum([0, *(bucket.batches for bucket in self.buckets)])
        self.steps = int(self._first_batch[-1])
        self._bucket_of = np.empty(len(lengths), np.int64)
        for b, bucket in enumerate(self.buckets):
            self._bucket_of[bucket.samples] = b
        self._epoch_order = (-1, np.zeros(0, np.int64))  # the last epoch that was asked for, and its batches in order
        self.phases = [Phase(0, len(lengths))]  # for the prefetch server, which makes the plan from the budget
        self.orders = [_SingleSamples(self)]

    def check(self, world: int, accumulate: int) -> None:
        """Raises DataError if a batch is too small for the processes and their micro-batches."""
        smallest, length = min((len(b.samples) // b.batches, b.length) for b in self.buckets)
        if smallest < world * accumulate:
            raise DataError(
                f"data.batch = {{seconds: {self.budget.size:g}}}: a batch of recordings of up to {length:g} s has"
                f" {smallest} samples, fewer than {world} processes × {accumulate} micro-batches; write more seconds,"
                " or a larger parallel.micro_batch"
            )

    def _batch_of(self, step: int) -> tuple[int, int, int]:
        """(epoch, bucket, batch of the bucket) of a step."""
        epoch, position = divmod(step, self.steps)
        if self.shuffle:
            order = self._epoch_order
            if order[0] != epoch:
                key = hash_to_key(self.seed, _STEP_KEYS, epoch)
                self._epoch_order = order = epoch, permute(np.arange(self.steps), self.steps, key)
            position = int(order[1][position])
        b = int(np.searchsorted(self._first_batch, position, "right")) - 1
        return epoch, b, position - int(self._first_batch[b])

    def _sample_key(self, epoch: int, b: int) -> int:
        return hash_to_key(self.seed, _SAMPLE_KEYS, epoch, b)

    def batch(self, step: int) -> int:
        _, b, k = self._batch_of(step)
        return self.buckets[b].first(k + 1) - self.buckets[b].first(k)

    def share(self, step: int, part: int, parts: int) -> tuple[int, int]:
        batch = self.batch(step)
        return batch * part // parts, batch * (part + 1) // parts

    def facts(self, step: int) -> dict[str, float]:
        """{"seconds": the length to which the samples of the batch are padded}."""
        return {"seconds": self.buckets[self._batch_of(step)[1]].length}

    def work(self, step: int) -> float:
        """The padded length of the batch, relative to that of a batch of samples of the greatest length."""
        full = max(1, int(self.budget.size // self.budget.longest)) * self.budget.longest
        return self.batch(step) * self.facts(step)["seconds"] / full

    def neighbours(self, dataset: int, global_index: int) -> Iterator[int]:
        """The global index of a sample, then those of the other samples of its bucket, again and again."""
        epoch, number = divmod(global_index, len(self.lengths))
        members = self.buckets[self._bucket_of[number]].samples
        place = int(np.searchsorted(members, number))
        for n in itertools.count(place):
            yield epoch * len(self.lengths) + int(members[n % len(members)])

    def slots(self, step: int, first: int, last: int) -> Slots:
        """The slots [first, last) of the global batch at `step`. There is one lane; the place counts all samples."""
        epoch, b, k = self._batch_of(step)
        bucket, count = self.buckets[b], len(self.lengths)
        index = np.arange(bucket.first(k) + first, bucket.first(k) + last)
        if self.shuffle:
            index = permute(index, len(bucket.samples), self._sample_key(epoch, b))
        zeros = np.zeros(len(index), np.int64)
        return Slots(zeros, zeros, np.full(len(index), step), epoch * count + bucket.samples[index])

    def slots_of_steps(self, step: int, steps: int, rank: int, world: int) -> tuple[np.ndarray, Slots]:
        found = [self.slots(n, *self.share(n, rank, world)) for n in range(step, step + steps)]
        slots = Slots(*(np.concatenate(column) for column in zip(*found, strict=True)))
        return slots.place, slots

    def micro_batches(
        self, indices: np.ndarray, accumulate: int, rank: int, world: int
    ) -> dict[int, list[tuple[int, int]]]:
        out = {}
        for index in indices.tolist():
            step, micro = divmod(index, accumulate)
            slots = self.slots(step, *self.share(step, rank * accumulate + micro, world * accumulate))
            out[index] = list(zip(slots.dataset.tolist(), slots.global_index.tolist(), strict=True))
        return out

    def epochs(self, step: int) -> list[float]:
        return [step / self.steps]

    def constants(self) -> str:
        digest = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self.lengths).tobytes())
        order = f"seed {self.seed}" if self.shuffle else "in file order"
        return f"v{VERSION} {order} {self.budget.size:g} s up to {self.budget.longest:g} s, lengths {digest}"

    def lines(self) -> list[str]:
        """Lines about the buckets, for the log of a run."""
        padded = sum(len(b.samples) * b.length for b in self.buckets)
        used = np.minimum(self.lengths, self.budget.longest).sum()
        sizes = [len(b.samples) / b.batches for b in self.buckets]
        out = [
            f"batches of {self.budget.size:g} s: {self.steps} steps per epoch, {len(self.buckets)} groups of up to"
            f" {', '.join(f'{b.length:g}' for b in self.buckets)} s with {min(sizes):.0f} to {max(sizes):.0f} recordings"
            f" in a batch; {1 - used / padded:.1%} is padding"
        ]
        if longer := int((self.lengths > self.budget.longest + 1 / GRID).sum()):
            out.append(
                f"{longer} recordings are longer than data.seconds = {self.budget.longest:g}: a cut of this length is"
                " drawn from each of them in every epoch"
            )
        return out


class _SingleSamples:
    """The order of the samples as the prefetch server and its cache see it: chunks of one sample."""

    chunk = 1

    def __init__(self, plan: BudgetPlan):
        self.plan = plan

    def block_ends(self, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The first step after that at `place` [n]: a sample is used once in an epoch."""
        return place + 1

    def next_use(self, first: int, epoch: int) -> int:
        """The step at which sample `first` is used in `epoch`."""
        plan = self.plan
        b = int(plan._bucket_of[first])
        bucket = plan.buckets[b]
        index = np.searchsorted(bucket.samples, [first])
        if plan.shuffle:
            index = permute(index, len(bucket.samples), plan._sample_key(epoch, b), inverse=True)
        batch = ((int(index[0]) + 1) * bucket.batches - 1) // len(bucket.samples)
        position = np.array([plan._first_batch[b] + batch])
        if plan.shuffle:
            position = permute(position, plan.steps, hash_to_key(plan.seed, _STEP_KEYS, epoch), inverse=True)
        return epoch * plan.steps + int(position[0])


AnyPlan = Plan | BudgetPlan
