"""The plan of a run: which sample of which dataset fills which slot of which global batch, for any number of datasets
and phases. All of it is a pure function of the seed and the step.

A global batch of B slots is divided into L lanes of B / L consecutive slots. Each process takes a contiguous range of
the slots. Therefore the global batches do not depend on the number of processes, as long as it divides B. If it also
divides L, each lane belongs to one process, and each byte of the data is read by one process only.

In most steps the datasets are mixed. The slots of a lane in mixed steps, counted from the first step of the phase on,
are the positions of the lane. A periodic sequence, in which every dataset is spread evenly, chooses the dataset of each
position. Because it is periodic, the number of samples of a dataset before any position can be computed without a loop
over the steps. A share of the steps may be homogeneous: all slots of such a step are filled from one dataset. The place
of a slot is the number of samples of its dataset that came before it in its lane, in all steps; `Order` gives the
sample at each place. A phase begins at a step and sets the batch size and the weights from there on; every dataset
continues at its next sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.errors import DataError
from data_pipeline.order.permutation import VERSION, Order

# The length of the mixing sequence. It is prime, so that a lane, which takes every L-th entry, visits all entries.
PERIOD = 10007
DATASET_SEED_STEP = 7919  # difference between the seeds of consecutive datasets, so that their orders differ


@dataclass(frozen=True)
class Phase:
    """The settings from `step` on: samples per step, weights of the datasets in mixed steps, and for each dataset the
    share of the steps that are homogeneous and filled by it.
    """

    step: int
    batch: int
    weights: tuple[float, ...] = (1.0,)
    homogeneous: tuple[float, ...] = (0.0,)


class Slots(NamedTuple):
    """n slots, as arrays [n]."""

    dataset: np.ndarray
    lane: np.ndarray
    place: np.ndarray  # how many samples of the dataset came before in this lane
    global_index: np.ndarray  # epoch · (number of samples of the dataset) + sample


def even_sequence(shares: np.ndarray, period: int = PERIOD) -> np.ndarray:
    """A sequence [period] of choices among D options whose shares [D] sum to 1, spread evenly: among the first t
    choices, each option occurs t times its share, with a deviation of at most 1.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980). Shares are rounded to multiples of
    1 / period.
    """
    exact = np.asarray(shares, float) * period
    counts = np.floor(exact).astype(int)
    for d in np.argsort(counts - exact, kind="stable")[: period - counts.sum()]:
        counts[d] += 1
    active = [(d, int(n)) for d, n in enumerate(counts) if n]
    slack = period / max(1, 2 * len(active) - 2)
    times_chosen, out = [0] * len(counts), np.empty(period, np.int32)
    for t in range(1, period + 1):
        # (lag of the option behind its share, in units of 1 / period; its count; the option)
        lags = [(n * t - times_chosen[d] * period, n, d) for d, n in active]
        # Among the options that lag enough, choose the one that has the least time left before it deviates by 1.
        candidates = [(lag, n, d) for lag, n, d in lags if lag >= slack - 0.5 or len(active) == 1]
        _, d = min(((period - slack - lag) / n, d) for lag, n, d in candidates)
        times_chosen[d] += 1
        out[t - 1] = d
    return out


class _PhaseOrder:
    """The order of one phase: which dataset is at which place of which lane.

    `base` [D, lanes]: how many samples of each dataset each lane has read before the phase. D: number of datasets.
    """

    def __init__(self, phase: Phase, lanes: int, base: np.ndarray):
        self.phase, self.lanes, self.base = phase, lanes, base
        self.per_lane = phase.batch // lanes
        weights = np.array(phase.weights, float)
        sequence = even_sequence(weights / weights.sum() if weights.any() else np.ones(1))
        # Lane l takes the entries l, l + lanes, l + 2 · lanes, … of the periodic sequence. `lane_sequence` has those of
        # lane 0; those of lane l are the same, but begin at entry `shift[l]` of it.
        self.lane_sequence = sequence[np.arange(PERIOD) * lanes % PERIOD]
        self.shift = np.arange(lanes) * pow(lanes, -1, PERIOD) % PERIOD
        # [D, 2·PERIOD + 1]: how often each dataset occurs in the first n entries of two periods of `lane_sequence`.
        self.dataset_counts = _counts_before(np.tile(self.lane_sequence, 2), range(len(weights)))
        # [PERIOD]: the kind of each step, −1 for mixed, or the dataset that fills it.
        shares = np.array(phase.homogeneous, float)
        self.kinds = even_sequence(np.concatenate([[1 - shares.sum()], shares])) - 1
        # [1 + D, PERIOD + 1]: how often each kind occurs in the first n entries of `kinds`.
        self.kind_counts = _counts_before(self.kinds, range(-1, len(shares)))

    def _kind_count(self, kind: np.ndarray | int, steps: np.ndarray) -> np.ndarray:
        """How many of the first `steps` steps of the phase are of a kind: −1 for mixed, or the dataset that fills a
        homogeneous step.
        """
        row = np.asarray(kind) + 1
        return steps // PERIOD * self.kind_counts[row, -1] + self.kind_counts[row, steps % PERIOD]

    def _mixed_count(self, dataset: np.ndarray, lane: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """How many of the first `positions` positions of a lane belong to a dataset."""
        shift = self.shift[lane]
        partial = self.dataset_counts[dataset, shift + positions % PERIOD] - self.dataset_counts[dataset, shift]
        return positions // PERIOD * self.dataset_counts[dataset, PERIOD] + partial

    def slots(self, steps: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(dataset, lane, place), each [n], as in `Slots`, of the slots [n] of the global batches at steps [n]."""
        lane, inside = slot // self.per_lane, slot % self.per_lane
        if len(self.phase.weights) == 1:
            dataset = np.zeros_like(lane)
            return dataset, lane, self.base[0, lane] + (steps - self.phase.step) * self.per_lane + inside
        steps = steps - self.phase.step
        kind = self.kinds[steps % PERIOD]
        earlier_positions = self._kind_count(-1, steps) * self.per_lane  # of the lane
        homogeneous = kind >= 0
        position = np.where(homogeneous, earlier_positions, earlier_positions + inside)
        dataset = np.where(homogeneous, kind, self.lane_sequence[(position + self.shift[lane]) % PERIOD])
        # Samples of the dataset before: in earlier phases, in mixed steps, in homogeneous steps, and in this step.
        place = self.base[dataset, lane] + self._mixed_count(dataset, lane, position)
        place += self._kind_count(dataset, steps) * self.per_lane + np.where(homogeneous, inside, 0)
        return dataset, lane, place

    def base_after(self, steps: int) -> np.ndarray:
        """`base` of a phase that begins `steps` steps after this one."""
        datasets, lanes = np.indices(self.base.shape)
        if len(self.phase.weights) == 1:
            return self.base + steps * self.per_lane
        end = np.array(steps)
        positions = self._kind_count(-1, end) * self.per_lane
        in_mixed_steps = self._mixed_count(datasets, lanes, positions)
        return self.base + in_mixed_steps + self._kind_count(datasets, end) * self.per_lane


class Plan:
    """The plan of the whole run.

    `counts`: the number of samples of each dataset; `sample_bytes`: the mean size of a sample of each dataset. The
    batch size of the first phase determines the number of lanes. Raises DataError for invalid phases.
    """

    def __init__(
        self,
        counts: list[int],
        phases: list[Phase],
        seed: int = 0,
        shuffle: bool = True,
        sample_bytes: list[float] | None = None,
    ):
        batch = phases[0].batch
        self.lanes = _lanes(batch) if shuffle else 1  # with one lane, samples come in the order of the shards
        sizes = sample_bytes or [0.0] * len(counts)
        self.orders = [
            Order.of(count, self.lanes, seed + DATASET_SEED_STEP * d, shuffle, sizes[d], batch)
            for d, count in enumerate(counts)
        ]
        self.seed, self.shuffle, self.phases = seed, shuffle, phases
        self._phase_orders: list[_PhaseOrder] = []
        base = np.zeros((len(counts), self.lanes), np.int64)
        for phase in phases:
            _check(phase, self.phases, len(counts), self.lanes)
            if self._phase_orders:
                previous = self._phase_orders[-1]
                base = previous.base_after(phase.step - previous.phase.step)
            self._phase_orders.append(_PhaseOrder(phase, self.lanes, base))

    def batch(self, step: int) -> int:
        """The number of samples of the global batch at a step."""
        return self._order_at(step).phase.batch

    def share(self, step: int, part: int, parts: int) -> tuple[int, int]:
        """The slots [first, last) of part `part` of `parts` equal ones of the global batch at a step."""
        size = self.batch(step) // parts
        return part * size, (part + 1) * size

    def facts(self, step: int) -> dict[str, float]:
        """What the samples of a step's batch have in common, for the views: nothing here."""
        return {}

    def lines(self) -> list[str]:
        """Lines about the batches for the log of a run: none here."""
        return []

    def work(self, step: int) -> float:
        """The computation of a step, relative to that of a step with the first global batch."""
        return self.batch(step) / self.batch(0)

    def neighbours(self, dataset: int, global_index: int) -> Iterator[int]:
        """The global index of a sample, then those after it in its chunk, those before it in the chunk, and those after
        the chunk without an end: the samples that replace it if it is damaged."""
        chunk = self.orders[dataset].chunk
        begin = global_index // chunk * chunk
        end = begin + chunk
        yield from range(global_index, end)
        yield from range(begin, global_index)
        yield from itertools.count(end)

    def _order_at(self, step: int) -> _PhaseOrder:
        """The order of the phase to which a step belongs."""
        return next(order for order in reversed(self._phase_orders) if order.phase.step <= step)

    def slots(self, step: int, first: int, last: int) -> Slots:
        """The slots [first, last) of the global batch at `step`."""
        slot = np.arange(first, last, dtype=np.int64)
        return self._slots(self._order_at(step), np.full(slot.shape, step), slot)

    def slots_of_steps(self, step: int, steps: int, rank: int, world: int) -> tuple[np.ndarray, Slots]:
        """(step of each slot, slots) of process `rank` of `world` in the `steps` steps from `step` on, or only up to
        the end of the phase if it ends earlier.
        """
        phase_order = self._order_at(step)
        size = phase_order.phase.batch // world
        count = min([steps, *(p.step - step for p in self.phases if p.step > step)])
        slot_steps = np.repeat(np.arange(step, step + count), size)
        own_slots = np.arange(rank * size, (rank + 1) * size)
        return slot_steps, self._slots(phase_order, slot_steps, np.tile(own_slots, count))

    def micro_batches(
        self, indices: np.ndarray, accumulate: int, rank: int, world: int
    ) -> dict[int, list[tuple[int, int]]]:
        """{micro-batch: its (dataset, global index) pairs} for micro-batches `indices` [n] of process `rank` of
        `world`.

        Micro-batch i is number i % accumulate of step i // accumulate. Micro-batches after the end of the phase to
        which the first one belongs are left out.
        """
        steps = indices // accumulate
        phase_order = self._order_at(int(steps[0]))
        end = min((p.step for p in self.phases if p.step > steps[0]), default=None)
        indices = indices if end is None else indices[steps < end]
        size = phase_order.phase.batch // (world * accumulate)
        first = (rank * accumulate + indices % accumulate) * size
        slot = (first[:, None] + np.arange(size)).ravel()
        slots = self._slots(phase_order, np.repeat(indices // accumulate, size), slot)
        pairs = list(zip(slots.dataset.tolist(), slots.global_index.tolist(), strict=True))
        return {int(i): pairs[n * size : (n + 1) * size] for n, i in enumerate(indices)}

    def _slots(self, phase_order: _PhaseOrder, steps: np.ndarray, slot: np.ndarray) -> Slots:
        dataset, lane, place = phase_order.slots(steps, slot)
        if len(self.orders) == 1:
            return Slots(dataset, lane, place, self.orders[0].global_index(lane, place))
        global_index = np.empty_like(place)
        for d, order in enumerate(self.orders):
            of_dataset = np.flatnonzero(dataset == d)
            global_index[of_dataset] = order.global_index(lane[of_dataset], place[of_dataset])
        return Slots(dataset, lane, place, global_index)

    def epochs(self, step: int) -> list[float]:
        """How many epochs of each dataset have been read before `step`; 1.5 is one and a half."""
        phase_order = self._order_at(step)
        used = phase_order.base_after(step - phase_order.phase.step).sum(1)
        return [float(n) / order.count for n, order in zip(used, self.orders, strict=True)]

    def constants(self) -> str:
        """The version and the constants of the order as a short text. Runs with different texts have different
        batches."""
        sizes = ",".join(f"{order.chunk}x{order.block}" for order in self.orders[:4])
        return (
            f"v{VERSION} seed {self.seed} lanes {self.lanes} {sizes}" if self.shuffle else f"v{VERSION} in file order"
        )


def _counts_before(sequence: np.ndarray, values: range) -> np.ndarray:
    """[values, n + 1]: how often each value occurs before each position of a sequence [n], and in all of it."""
    occurs = sequence[None] == np.array(values)[:, None]  # [values, n]
    return np.pad(occurs.cumsum(1), ((0, 0), (1, 0)))


def _lanes(batch: int) -> int:
    """The number of lanes: the largest divisor of the batch size that is at most max(64, batch / 64).

    It is the largest number of processes that can share the data without reading any byte twice.
    """
    return max(n for n in range(1, min(max(64, batch // 64), batch) + 1) if batch % n == 0)


def _check(phase: Phase, phases: list[Phase], datasets: int, lanes: int) -> None:
    where = "data" if phase is phases[0] else f"data.phases, step {phase.step}"
    if phase is phases[0] and phase.step:
        raise DataError(f"{where}: the first phase begins at step {phase.step}, but it has to begin at step 0")
    if [p.step for p in phases] != sorted({p.step for p in phases}):
        raise DataError(
            f"data.phases: the phases begin at steps {[p.step for p in phases[1:]]}; write steps in increasing order,"
            " from 1 on"
        )
    if phase.batch < 1 or phase.batch % lanes:
        raise DataError(
            f"{where}: batch = {phase.batch} is not a multiple of {lanes}, the number of lanes, which follows from the"
            f" batch of the first phase; write {lanes * max(1, round(phase.batch / lanes))}"
        )
    if len(phase.weights) != datasets or len(phase.homogeneous) != datasets:
        raise DataError(
            f"{where}: {len(phase.weights)} weights and {len(phase.homogeneous)} homogeneous shares for a mix of"
            f" {datasets} datasets; write one of each per dataset"
        )
    smallest_share = 0.5 / PERIOD  # a smaller one would be rounded to 0
    for name, values, total, of_total in (
        ("weight", phase.weights, max(1e-300, sum(phase.weights)), " of the sum of the weights"),
        ("homogeneous", phase.homogeneous, 1, ""),
    ):
        for value in values:
            if not 0 <= value < float("inf") or 0 < value / total < smallest_share:
                raise DataError(f"{where}: {name} = {value:g}; write 0, or a number from 1/{PERIOD}{of_total} up")
    if sum(phase.homogeneous) > 1:
        raise DataError(f"{where}: the homogeneous shares {list(phase.homogeneous)} sum to more than 1; write less")
    if sum(phase.weights) <= 0 and sum(phase.homogeneous) < 1:
        raise DataError(f"{where}: all weights are 0; write a weight above 0 for at least one dataset")
