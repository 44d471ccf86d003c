"""Stream: an endless iterator of batches whose whole state is the number of the next step.

Data workers compute batch after batch: `Plan` says which samples, their bytes come from local shards or from the feeder, the objective's views
make arrays of them. Batch s comes out the same on any number of processes and workers. A damaged sample is never trained on: a neighbour from its
own chunk takes its place, its name goes to the ledger, and too many of them end the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data_pipeline import device_color
from data_pipeline.batches import Batches, Views
from data_pipeline.ledger import Ledger
from data_pipeline.plan import Phase
from data_pipeline.remote import Bytes, Feeder
from data_pipeline.rows import Rows
from data_pipeline.shards import Look, Samples, plan_of
from data_pipeline.slabs import Slabs
from data_pipeline.storage import DataError, is_local
from data_pipeline.watch import Meter, Watchdog


@dataclass
class Reading:
    """How bytes are read; no number of a batch depends on it."""

    workers: int = 1  # data processes
    threads: int = 1  # in each of them
    ahead_mb: float = 512  # fetched before they are needed
    requests: int = 16  # to the store at a time
    attempt_seconds: float = 30.0  # for one request
    retry_seconds: float = 600.0  # without any answer before the run ends
    stall_seconds: float = 300.0  # without a batch before all stacks are written to stderr
    cache: str | None = None  # a folder on a local disk
    cache_gb: float = 100.0


def default_workers(processes: int = 1) -> int:
    """Data workers per trainer process: half of the cores it has for itself, at least one, at most eight."""
    return min(8, max(1, (os.cpu_count() or 1) // processes // 2))


class Stream:
    """Batches for one of `world` processes, from step `state_dict()["step"]` on; each step gives `accumulate` micro-batches.

    `samples`: one set, or several with `phases` that say how they are mixed. `batch` is global, and of the first phase. `ledger`: a folder where
    damaged samples are written down.
    """

    def __init__(
        self,
        samples: Samples | Rows | Sequence[Samples | Rows],
        views: Views,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        phases: list[Phase] | None = None,
        look: Look | None = None,
        reading: Reading | None = None,
        ledger: Ledger | None = None,
    ):
        self.samples = [samples] if isinstance(samples, (Samples, Rows)) else list(samples)
        phases = phases or [Phase(0, batch)]
        for phase in phases:
            self._check(phase, world, accumulate)
        self.plan = plan_of(self.samples, phases, seed, shuffle)
        self.accumulate, self.rank, self.world, self.micro = accumulate, rank, world, 0
        self.reading = reading or Reading(workers=workers)
        self.ledger = ledger or Ledger(None)
        self.ledger.watch(self.samples)
        self.batches = Batches(self.samples, self.plan, views, look or Look(), (rank, world, accumulate))
        self.batches.threads = self.reading.threads
        self.meter, self.watchdog = Meter(), Watchdog(self.reading.stall_seconds)
        self._iterator: Iterator | None = None
        self._feeder: Feeder | None = None

    @property
    def workers(self) -> int:
        return self.reading.workers

    def _check(self, phase: Phase, world: int, accumulate: int) -> None:
        where = f" from step {phase.step} on" if phase.step else ""
        names = ", ".join(s.names for s in self.samples)
        count = sum(len(s) for s in self.samples)
        if phase.batch > count:
            raise DataError(
                f"data.batch = {phase.batch}{where} is more than the {count} samples in {names}; write data.batch={count} or less"
            )
        if phase.batch % (world * accumulate):
            raise DataError(
                f"data.batch = {phase.batch}{where} does not divide into {world} processes × {accumulate} micro-batches"
            )

    def first(self) -> dict[str, Tensor]:
        """Micro-batch 0 of the run, made here and now, whatever the position."""
        feeder = self._start_feeder(0, 1)
        try:
            batch = self.batches[0]
        finally:
            if feeder:
                feeder.close()
            self._connect(self._feeder)
        if "error" in batch:
            raise DataError(batch["error"])
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._iterator is None:
            self._iterator = self._start()
        began = time.perf_counter()
        self.batches.slabs.collect()
        with self.watchdog.waiting(self.micro // self.accumulate):
            batch = next(self._iterator)
        if "error" in batch:
            self.close()
            raise DataError(batch["error"])
        self.batches.slabs.received(batch.pop("slab"), {k: v for k, v in batch.items() if isinstance(v, Tensor)})
        self.meter.add(time.perf_counter() - began, batch.pop("counts"))
        self.micro += 1
        self.ledger.add(self.micro // self.accumulate, batch.pop("bad"))
        return batch

    def _start(self) -> Iterator:
        self._feeder = self._start_feeder(self.micro // self.accumulate, self.workers)
        self.batches.slabs = Slabs(self.workers)
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.micro, 1 << 62),  # type: ignore[arg-type]
            num_workers=self.workers,
            worker_init_fn=self.watchdog.start_worker,
            prefetch_factor=4 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        iterator = iter(loader)
        self.watchdog.watch([w.pid for w in getattr(iterator, "_workers", [])], self._feeder)
        return iterator

    def _start_feeder(self, step: int, workers: int) -> Feeder | None:
        """A feeder from a step on, where bytes do not lie on a local disk."""
        local = all(
            is_local(held.manifest.url(int(row))) for s in self.samples for held in s.manifests for row in held.rows[:1]
        )
        if local and self.reading.cache is None:
            return None
        r = self.reading
        config = {
            "datasets": [s.about for s in self.samples],
            "phases": [[p.step, p.batch, p.weights, p.homogeneous] for p in self.plan.phases],
            "extensions": self.batches.look.extensions,
            **{"seed": self.plan.seed, "shuffle": self.plan.shuffle, "step": step},
            **{"rank": self.rank, "world": self.world, "cache": r.cache, "cache_gb": r.cache_gb},
            **{"inflight": r.requests, "ahead_mb": r.ahead_mb},
            **{"attempt_seconds": r.attempt_seconds, "retry_seconds": r.retry_seconds},
        }
        feeder = Feeder(config, workers)
        self._connect(feeder)
        return feeder

    def _connect(self, feeder: Feeder | None) -> None:
        widths = [len(s.extensions) for s in self.samples]
        self.batches.feeder = Bytes(feeder.sockets, self.batches.columns, widths) if feeder else None

    def close(self) -> None:
        """End workers and feeder; the next batch would start them anew."""
        self._iterator = None
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None
        self.watchdog.close()

    @property
    def epochs(self) -> list[float]:
        """How many times each dataset has been gone through."""
        return self.plan.epochs(self.micro // self.accumulate)

    def state_dict(self) -> dict[str, Any]:
        data = ",".join(samples.id[:8] for samples in self.samples)
        return {"step": self.micro // self.accumulate, "data": data, "order": self.plan.constants()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a step. Other data or another order than the state's would give other batches, so they are refused."""
        own = self.state_dict()
        if not own["data"].startswith(state["data"]):  # new datasets may come in later phases
            raise DataError(
                f"the checkpoint was written on other data ({state['data']}, now {own['data']}): it cannot go on exactly; start another run"
            )
        if state["order"] != own["order"]:
            raise DataError(
                f'the checkpoint was written with the order "{state["order"]}", but this run has "{own["order"]}": it cannot go on exactly'
            )
        self.close()
        self.micro = state["step"] * self.accumulate


def to_device(
    batch: dict[str, Tensor], device: torch.device, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> dict[str, Tensor]:
    """The batch on the device, tokens as they are, uint8 images [..., C, H, W] as floats (x / 255 − mean) / std; colours that were left to the device are changed first."""
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    out = {}
    for key, value in moved.items():
        if key.endswith(".color"):
            continue
        if f"{key}.color" in moved:
            value = device_color.apply(value, moved[f"{key}.color"])
        if value.dtype == torch.uint8:
            value = device_color.normalize(value, mean, std)
        out[key] = value
    return out
