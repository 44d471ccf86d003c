"""The plan of a run: which sample of which dataset stands in which slot of which global batch, for any number of datasets and phases.

Slots are lane-major: slot = lane · (batch / lanes) + place in the lane. A process takes a contiguous slice of the slots, so every number of
processes that divides the batch sees the same global batches, and while they divide the lanes each byte is read by one of them.
Datasets are mixed inside the lanes by an evenly spread sequence whose period is prime, so a dataset's position in a lane is arithmetic. A share
of the steps may be homogeneous: filled from one dataset. A phase is a step from which another batch size or other weights hold; every dataset
goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.order import VERSION, Order
from data_pipeline.storage import DataError

PERIOD = 10007  # of the mixing sequence; prime, so that every lane passes through all of it


@dataclass(frozen=True)
class Phase:
    """From `step` on: samples per step, the datasets' weights in mixed steps, and the share of steps that each fills alone."""

    step: int
    batch: int
    weights: tuple[float, ...] = (1.0,)
    homogeneous: tuple[float, ...] = (0.0,)


class Slots(NamedTuple):
    """Slots [n]: dataset, lane, place in the dataset's lane, virtual id (epoch · count + sample)."""

    dataset: np.ndarray
    lane: np.ndarray
    place: np.ndarray
    virtual: np.ndarray


def even_sequence(shares: np.ndarray, period: int = PERIOD) -> np.ndarray:
    """`period` choices among D, as even as can be: after t of them, each has been chosen within 1 of t times its share.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980). Shares sum to 1 and are rounded to 1 / period.
    """
    exact = np.asarray(shares, float) * period
    counts = np.floor(exact).astype(int)
    for d in np.argsort(counts - exact, kind="stable")[: period - counts.sum()]:
        counts[d] += 1
    active = [(d, int(n)) for d, n in enumerate(counts) if n]
    slack = period / max(1, 2 * len(active) - 2)
    given, out = [0] * len(counts), np.empty(period, np.int32)
    for t in range(1, period + 1):
        late = [(n * t - given[d] * period, n, d) for d, n in active]  # behind its share, in units of 1 / period
        _, d = min(((period - slack - by) / n, d) for by, n, d in late if by >= slack - 0.5 or len(active) == 1)
        given[d] += 1
        out[t - 1] = d
    return out


class _Mixed:
    """One phase: who is in which place of which lane, and how far each dataset has come before."""

    def __init__(self, phase: Phase, lanes: int, base: np.ndarray):
        self.phase, self.lanes, self.base = phase, lanes, base  # base [D, lanes]: places of each dataset used before
        self.per_lane = phase.batch // lanes
        weights = np.array(phase.weights, float)
        sequence = even_sequence(weights / weights.sum() if weights.any() else np.ones(1))
        along = sequence[np.arange(PERIOD) * lanes % PERIOD]  # what one lane sees; another sees it shifted
        self.shift = np.arange(lanes) * pow(lanes, -1, PERIOD) % PERIOD
        chosen = np.concatenate([along, along])[None] == np.arange(len(weights))[:, None]
        self.along, self.before = along, np.pad(chosen.cumsum(1), ((0, 0), (1, 0)))  # before [D, 2·PERIOD + 1]
        shares = np.array(phase.homogeneous, float)
        kinds = even_sequence(np.concatenate([[1 - shares.sum()], shares])) - 1  # −1: mixed; else the dataset
        self.kinds = kinds
        self.kinds_before = np.pad((kinds[None] == np.arange(-1, len(shares))[:, None]).cumsum(1), ((0, 0), (1, 0)))

    def _kind_count(self, kind: np.ndarray | int, steps: np.ndarray) -> np.ndarray:
        """How many of the first `steps` steps of the phase are of a kind."""
        row = np.asarray(kind) + 1
        return steps // PERIOD * self.kinds_before[row, -1] + self.kinds_before[row, steps % PERIOD]

    def _count(self, dataset: np.ndarray, lane: np.ndarray, places: np.ndarray) -> np.ndarray:
        """How many of the first `places` mixed places of a lane are a dataset's."""
        shift = self.shift[lane]
        inside = self.before[dataset, shift + places % PERIOD] - self.before[dataset, shift]
        return places // PERIOD * self.before[dataset, PERIOD] + inside

    def slots(self, steps: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(dataset, lane, place) of slots [n] at steps [n], counted from the run's first step."""
        lane, inside = slot // self.per_lane, slot % self.per_lane
        if len(self.phase.weights) == 1:
            here = np.zeros_like(lane)
            return here, lane, self.base[0, lane] + (steps - self.phase.step) * self.per_lane + inside
        steps = steps - self.phase.step
        kind = self.kinds[steps % PERIOD]
        mixed = self._kind_count(-1, steps) * self.per_lane  # places before this step
        alone = kind >= 0
        place = np.where(alone, mixed, mixed + inside)
        dataset = np.where(alone, kind, self.along[(place + self.shift[lane]) % PERIOD])
        own = self.base[dataset, lane] + self._count(dataset, lane, place)
        own += self._kind_count(dataset, steps) * self.per_lane + np.where(alone, inside, 0)
        return dataset, lane, own

    def after(self, steps: int) -> np.ndarray:
        """`base` for a phase that begins `steps` steps after this one."""
        datasets, lanes = np.indices(self.base.shape)
        if len(self.phase.weights) == 1:
            return self.base + steps * self.per_lane
        at = np.array(steps)
        mixed = self._kind_count(-1, at) * self.per_lane
        return self.base + self._count(datasets, lanes, mixed) + self._kind_count(datasets, at) * self.per_lane


class Plan:
    """The whole run. `counts`: samples of each dataset, `sample_bytes`: their mean size. The first phase's batch fixes the number of lanes."""

    def __init__(
        self,
        counts: list[int],
        phases: list[Phase],
        seed: int = 0,
        shuffle: bool = True,
        sample_bytes: list[float] | None = None,
    ):
        batch = phases[0].batch
        self.lanes = _lanes(batch) if shuffle else 1  # one lane gives the samples as they lie
        sizes = sample_bytes or [0.0] * len(counts)
        self.orders = [Order.of(n, self.lanes, seed + 7919 * d, shuffle, sizes[d], batch) for d, n in enumerate(counts)]
        self.seed, self.shuffle, self.phases = seed, shuffle, phases
        self._parts: list[_Mixed] = []
        base = np.zeros((len(counts), self.lanes), np.int64)
        for phase in phases:
            _check(phase, self.phases, len(counts), self.lanes)
            if self._parts:
                base = self._parts[-1].after(phase.step - self._parts[-1].phase.step)
            self._parts.append(_Mixed(phase, self.lanes, base))

    def batch(self, step: int) -> int:
        """Samples of the global batch at a step."""
        return self._part(step).phase.batch

    def _part(self, step: int) -> _Mixed:
        return next(part for part in reversed(self._parts) if part.phase.step <= step)

    def slots(self, step: int, first: int, last: int) -> Slots:
        """The slots [first, last) of the global batch at `step`."""
        slot = np.arange(first, last, dtype=np.int64)
        return self._slots(self._part(step), np.full(slot.shape, step), slot)

    def ahead(self, step: int, steps: int, rank: int, world: int) -> tuple[np.ndarray, Slots]:
        """(step of each slot, slots) that process `rank` of `world` has in `steps` steps from `step` on; fewer where a phase ends."""
        part = self._part(step)
        ends = [p.step for p in self.phases if p.step > step]
        size = part.phase.batch // world
        count = min([steps, *(end - step for end in ends)])
        at = np.repeat(np.arange(step, step + count), size)
        return at, self._slots(part, at, np.tile(np.arange(rank * size, (rank + 1) * size), count))

    def micro_batches(
        self, indices: np.ndarray, accumulate: int, rank: int, world: int
    ) -> dict[int, list[tuple[int, int]]]:
        """(dataset, virtual id) of the slots of several micro-batches of a process, up to the end of the first one's phase.

        Micro-batch i is number i % accumulate of step i // accumulate.
        """
        steps = indices // accumulate
        part = self._part(int(steps[0]))
        end = min((p.step for p in self.phases if p.step > steps[0]), default=None)
        indices = indices if end is None else indices[steps < end]
        size = part.phase.batch // (world * accumulate)
        first = (rank * accumulate + indices % accumulate) * size
        slot = (first[:, None] + np.arange(size)).ravel()
        slots = self._slots(part, np.repeat(indices // accumulate, size), slot)
        pairs = list(zip(slots.dataset.tolist(), slots.virtual.tolist(), strict=True))
        return {int(i): pairs[n * size : (n + 1) * size] for n, i in enumerate(indices)}

    def _slots(self, part: _Mixed, steps: np.ndarray, slot: np.ndarray) -> Slots:
        dataset, lane, place = part.slots(steps, slot)
        if len(self.orders) == 1:
            return Slots(dataset, lane, place, self.orders[0].virtual(lane, place))
        virtual = np.empty_like(place)
        for d, order in enumerate(self.orders):
            here = np.flatnonzero(dataset == d)
            virtual[here] = order.virtual(lane[here], place[here])
        return Slots(dataset, lane, place, virtual)

    def epochs(self, step: int) -> list[float]:
        """How many times each dataset has been gone through before `step`."""
        part = self._part(step)
        used = part.after(step - part.phase.step).sum(1)
        return [float(n) / order.count for n, order in zip(used, self.orders, strict=True)]

    def constants(self) -> str:
        """Version and constants of the order, in short: other ones give other batches."""
        sizes = ",".join(f"{order.chunk}x{order.block}" for order in self.orders[:4])
        return (
            f"v{VERSION} seed {self.seed} lanes {self.lanes} {sizes}" if self.shuffle else f"v{VERSION} in file order"
        )


def _lanes(batch: int) -> int:
    """The largest divisor of the batch up to 64, or up to a 64th of it: as many processes as that read every byte once."""
    return max(n for n in range(1, min(max(64, batch // 64), batch) + 1) if batch % n == 0)


def _check(phase: Phase, phases: list[Phase], datasets: int, lanes: int) -> None:
    where = "data" if phase is phases[0] else f"data.phases, step {phase.step}"
    if phase is phases[0] and phase.step:
        raise DataError(f"{where}: the first phase begins at step {phase.step}; it has to begin at 0")
    if [p.step for p in phases] != sorted({p.step for p in phases}):
        raise DataError(f"data.phases: the steps {[p.step for p in phases[1:]]} have to rise from 1 on")
    if phase.batch < 1 or phase.batch % lanes:
        raise DataError(
            f"{where}: batch = {phase.batch} is not a multiple of {lanes}, the lanes that the run began with; write {lanes * max(1, round(phase.batch / lanes))}"
        )
    if len(phase.weights) != datasets or len(phase.homogeneous) != datasets:
        raise DataError(f"{where}: {len(phase.weights)} weights for {datasets} datasets; write one for each")
    for name, values in (("weight", phase.weights), ("homogeneous", phase.homogeneous)):
        for value in values:
            if (
                not 0 <= value < float("inf")
                or 0 < value / max(1e-300, sum(phase.weights) if name == "weight" else 1) < 0.5 / PERIOD
            ):
                raise DataError(f"{where}: {name} = {value:g}; write 0, or a share of 1/{PERIOD} or more")
    if sum(phase.homogeneous) > 1:
        raise DataError(f"{where}: the homogeneous shares {list(phase.homogeneous)} sum to more than 1")
    if sum(phase.weights) <= 0 and sum(phase.homogeneous) < 1:
        raise DataError(f"{where}: all weights are 0; give one dataset a weight")
