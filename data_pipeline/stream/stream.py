"""Stream: an endless iterator of batches. Its only state is the number of the next step.

Data workers make the batches: `Plan` chooses the samples, their bytes come from local shards or from the prefetch
server, and the objective's views turn them into arrays. The batch of a step is the same for any number of trainer
processes and data workers. A damaged sample is never trained on: another sample of its own chunk replaces it, the
damage log names it, and too many damaged samples end the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common import child_signals
from common.errors import DataError
from common.process_pool import cores
from data_pipeline.formats.decode_budget import DECODE_MB, Budget
from data_pipeline.order.budget import BatchBudget, BudgetPlan
from data_pipeline.order.schedule import Phase
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import Part
from data_pipeline.shards.dataset import Dataset as Source
from data_pipeline.shards.dataset import make_plan
from data_pipeline.storage.urls import is_local
from data_pipeline.stream import worker_processes
from data_pipeline.stream.batch_buffers import BatchBuffers
from data_pipeline.stream.damage_log import DamageLog
from data_pipeline.stream.prefetch_client import PrefetchClient, ServerProcess
from data_pipeline.stream.stream_stats import StreamStats, Watchdog
from data_pipeline.stream.worker import Batches, Views
from data_pipeline.stream.worker_processes import StartMethod

LIVENESS_CHECK_SECONDS = 1.0  # how often a wait for a batch checks that the workers are alive


@dataclass
class Reading:
    """How bytes are read. The content of the batches does not depend on it."""

    workers: int = 1  # data worker processes
    threads: int = 1  # threads of each worker
    # the most decoded images, in MB, that the threads of a worker hold at once; a larger image is decoded alone
    decode_mb: float = DECODE_MB
    ahead_mb: float = 512  # MB of shards that the prefetch server reads ahead
    requests: int = 16  # concurrent requests to the store
    attempt_seconds: float = 30.0  # time limit of one request
    retry_seconds: float = 600.0  # the run ends after so long without any response from the store
    stall_seconds: float = 120.0  # after so long without a batch, the stacks of all threads are written to stderr
    cache: str | None = None  # a folder on a local disk that keeps what was fetched; None: no cache
    cache_gb: float = 100.0  # the most that this folder holds
    # of the workers; forkserver and spawn pickle datasets, views and parts
    start_method: StartMethod = "fork"
    pinned: bool = False  # whether batches are copied into pinned memory, for a GPU


_IMAGES: dict[str, Part] = {"image": Image()}


def default_workers(processes: int = 1) -> int:
    """Data workers per trainer process, of which `processes` run on this machine: half of the process's share of the
    cores, at least 1 and at most 8."""
    return min(8, max(1, cores() // processes // 2))


class Stream:
    """Iterates over the micro-batches of process `rank` of `world`: `accumulate` of them for each step, from step 0 on,
    or from the step that `seek` or `load_state_dict` sets.

    `samples`: one dataset, or several, with `phases` that define how they are mixed. `views`: makes the arrays of the
    batch from the parts of a sample. `batch`: the number of samples in the global batch, used if `phases` is not given.
    `parts`: the parts of a sample that the views get; images by default. `damage_log`: where damaged samples are
    logged. `budget`: the total length of a batch, in place of its number of samples.
    """

    def __init__(
        self,
        samples: Source | Sequence[Source],
        views: Views,
        batch: int,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 1,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        phases: list[Phase] | None = None,
        parts: Mapping[str, Part] | None = None,
        reading: Reading | None = None,
        damage_log: DamageLog | None = None,
        budget: BatchBudget | None = None,
    ):
        self.samples = list(samples) if isinstance(samples, Sequence) else [samples]
        self.budget = budget
        phases = phases or [Phase(0, batch)]
        for phase in phases if budget is None else ():
            self._check_batch_size(phase, world, accumulate)
        self.plan = make_plan(self.samples, phases, seed, shuffle, budget)
        if isinstance(self.plan, BudgetPlan):
            self.plan.check(world, accumulate)
        self.accumulate, self.rank, self.world, self.micro = accumulate, rank, world, 0
        self.reading = reading or Reading(workers=workers)
        self.damage_log = damage_log or DamageLog(None)
        self.damage_log.set_datasets(self.samples)
        self.batches = Batches(self.samples, self.plan, views, parts or _IMAGES, (rank, world, accumulate))
        self.batches.threads, self.batches.budget = self.reading.threads, Budget(self.reading.decode_mb * 2**20)
        self.absent = 0  # how often a sample was skipped because it lacks a part, since the stream was created
        self.stats, self.watchdog = StreamStats(), Watchdog(self.reading.stall_seconds)
        self._last: dict[str, Tensor] = {}  # the last micro-batch that was returned
        self._iterator: Iterator | None = None
        self._processes: list[Any] = []  # the data workers
        # called every LIVENESS_CHECK_SECONDS while `next` waits for a batch; an exception that it raises ends the wait
        self.while_waiting: Callable[[], None] = lambda: None
        self._server: ServerProcess | None = None

    @property
    def workers(self) -> int:
        return self.reading.workers

    def _check_batch_size(self, phase: Phase, world: int, accumulate: int) -> None:
        """Raises DataError if a phase's batch is larger than the data, or does not divide into micro-batches."""
        where = f" from step {phase.step} on" if phase.step else ""
        names = ", ".join(s.names for s in self.samples)
        count = sum(len(s) for s in self.samples)
        if phase.batch > count:
            raise DataError(
                f"data.batch = {phase.batch}{where} is more than the {count} samples in {names}; write"
                f" data.batch={count} or less"
            )
        if phase.batch % (world * accumulate):
            raise DataError(
                f"data.batch = {phase.batch}{where} does not divide into {world} processes × {accumulate} micro-batches"
            )

    def first(self) -> dict[str, Tensor]:
        """Micro-batch 0 of the run, made in this process without data workers. The position of the stream does not
        change."""
        server = self._start_server(0, 1)
        try:
            batch = self.batches[0]
        finally:
            if server:
                server.close()
            self._connect(self._server)
        if "error" in batch:
            raise DataError(batch["error"])
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._iterator is None:
            self._iterator = self._start()
        began = time.perf_counter()
        self.batches.buffers.collect()
        with self.watchdog.waiting(self.micro // self.accumulate):
            batch = self._wait()
        if "error" in batch:
            self.close()
            raise DataError(batch["error"])
        self.batches.buffers.received(batch.pop("buffer"), {k: v for k, v in batch.items() if isinstance(v, Tensor)})
        self.absent += batch["counts"]["absent"]
        self.stats.add(time.perf_counter() - began, batch.pop("counts"))
        self.micro += 1
        self.damage_log.add(self.micro // self.accumulate, batch.pop("bad"))
        self._last = batch
        return batch

    def stand_in(self) -> dict[str, Tensor]:
        """A substitute for the next micro-batch, for a trainer that no longer waits for it: the samples of the last
        one, truncated or repeated to the size of the next one. Reads no data."""
        step, micro = divmod(self.micro, self.accumulate)
        first, last = self.plan.share(step, self.rank * self.accumulate + micro, self.world * self.accumulate)
        size = last - first
        made = self.batches.collated(self._last)
        rows = {key: value[torch.arange(size) % len(value)] for key, value in self._last.items() if key not in made}
        return rows | self.batches.collated(rows)

    def _wait(self) -> dict[str, Any]:
        """Wait for the next item of the DataLoader. Every LIVENESS_CHECK_SECONDS, check that the workers are alive and
        call `while_waiting`."""
        assert self._iterator is not None
        while True:
            try:
                return next(self._iterator)
            except (RuntimeError, EOFError, OSError) as error:  # raised by the DataLoader itself, or by the views
                timed_out = "DataLoader timed out" in str(error)
                self._raise_if_dead(0 if timed_out else LIVENESS_CHECK_SECONDS)
                if not timed_out:
                    raise
            self.while_waiting()

    def _start(self) -> Iterator:
        """Start the prefetch server and the data workers at the current position."""
        self._server = self._start_server(self.micro // self.accumulate, self.workers)
        self.batches.buffers = BatchBuffers(self.workers)
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(self.micro, 1 << 62),  # type: ignore[arg-type]
            num_workers=self.workers,
            timeout=LIVENESS_CHECK_SECONDS if self.workers else 0,
            worker_init_fn=self.watchdog.start_worker,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self.reading.pinned,
            multiprocessing_context=self.reading.start_method if self.workers else None,
        )
        forked = self.reading.start_method == "fork"
        hidden = contextlib.nullcontext() if forked else worker_processes.main_module_hidden()
        with child_signals.signals_blocked(), _without_child_handler(), hidden:
            iterator = iter(loader)
        self._processes = list(getattr(iterator, "_workers", []))
        for worker in self._processes:
            worker._popen.terminate = worker._popen.kill  # workers ignore SIGTERM, which a scheduler sends to all
        self.watchdog.watch([worker.pid for worker in self._processes], self._server)
        return iterator

    def _raise_if_dead(self, patience: float) -> None:
        """Raises DataError if a data worker has ended, or ends within `patience` seconds."""
        until = time.monotonic() + patience
        while (dead := next((worker for worker in self._processes if worker.exitcode is not None), None)) is None:
            if time.monotonic() >= until:
                return
            time.sleep(0.01)
        self.close()
        if dead.exitcode >= 0:
            raise DataError(
                f"a data worker (process {dead.pid}) ended with code {dead.exitcode}; its error message is above"
            )
        number = -dead.exitcode
        causes = {
            signal.SIGKILL: (
                "most often by the kernel for lack of memory; write fewer data.workers, or a smaller"
                " data.fetch.ahead_mb or data.decode_mb"
            ),
            signal.SIGBUS: (
                "most often because /dev/shm is full (see `df -h /dev/shm`); make it larger, or write fewer"
                " data.workers"
            ),
        }
        cause = causes.get(number, "by a fault of a library that it uses")
        raise DataError(
            f"a data worker (process {dead.pid}) was killed by {child_signals.signal_name(number)}, {cause};"
            " run the same command again to resume"
        )

    def _start_server(self, step: int, workers: int) -> ServerProcess | None:
        """Start a prefetch server that reads from `step` on, for `workers` data workers. If all shards are on a local
        disk and no cache is configured, no server is needed, and None is returned."""
        local = all(
            is_local(part.manifest.url(int(row))) for s in self.samples for part in s.manifests for row in part.rows[:1]
        )
        if local and self.reading.cache is None:
            return None
        config = {
            "datasets": [s.arguments for s in self.samples],
            "budget": dataclasses.astuple(self.budget) if self.budget else None,
            "phases": [[p.step, p.batch, p.weights, p.homogeneous] for p in self.plan.phases],
            "extensions": self.batches.extensions,
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "step": step,
            "rank": self.rank,
            "world": self.world,
            "cache": self.reading.cache,
            "cache_gb": self.reading.cache_gb,
            "inflight": self.reading.requests,
            "ahead_mb": self.reading.ahead_mb,
            "attempt_seconds": self.reading.attempt_seconds,
            "retry_seconds": self.reading.retry_seconds,
        }
        server = ServerProcess(config, workers)
        self._connect(server)
        return server

    def _connect(self, server: ServerProcess | None) -> None:
        """Make the data workers read from a prefetch server, or, for None, directly from the shards."""
        widths = [len(s.extensions) for s in self.samples]
        self.batches.prefetch = PrefetchClient(server.sockets, self.batches.columns, widths) if server else None

    def close(self) -> None:
        """End the data workers and the prefetch server. A later `next` starts them again."""
        # The server first: a worker that waits for an answer of the server ends when the server does.
        if self._server is not None:
            self._server.close()
            self._server = None
        iterator, self._iterator, self._processes = self._iterator, None, []
        # Shut down explicitly: a traceback may keep the iterator alive.
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self.watchdog.close()

    def seek(self, step: int) -> None:
        """Set the step of the next batch."""
        self.close()
        self.micro = step * self.accumulate

    @property
    def epochs(self) -> list[float]:
        """The number of epochs of each dataset that have been read, as a fraction."""
        return self.plan.epochs(self.micro // self.accumulate)

    def state_dict(self) -> dict[str, Any]:
        data = ",".join(samples.id[:8] for samples in self.samples)
        return {"step": self.micro // self.accumulate, "data": data, "order": self.plan.constants()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a stored state.

        Raises DataError if the state was stored with other data or another order of the samples, because the batches
        would then differ from those of the run.
        """
        own = self.state_dict()
        if not own["data"].startswith(state["data"]):  # datasets may be appended, for phases that are still to come
            raise DataError(
                f"the checkpoint was written on other data ({state['data']}, now {own['data']}): it cannot be resumed"
                " exactly; start a new run"
            )
        if state["order"] != own["order"]:
            raise DataError(
                f'the checkpoint was written with the order "{state["order"]}", but this run has "{own["order"]}":'
                " it cannot be resumed exactly; start a new run"
            )
        self.seek(state["step"])


@contextlib.contextmanager
def _without_child_handler() -> Iterator[None]:
    """Restore the SIGCHLD handler when the context ends, because the start of a DataLoader replaces it.

    The DataLoader's handler raises an error as soon as a worker dies, at whatever line the trainer executes, for
    example in the middle of saving a checkpoint. Without that handler, `Stream._wait` reports the dead worker.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if main:
        signal.signal(signal.SIGCHLD, before)


def to_device(
    batch: Mapping[str, Tensor],
    device: torch.device,
    parts: Mapping[str, Part],
    part_of: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Move a batch to the device. A tensor that was made from a part is moved by `Part.place`; any other is copied.

    The part of the tensor "KEY" is parts["KEY"], or parts[part_of["KEY"]] if `part_of` has the key. If the batch has
    "KEY", its entries "KEY.name" are not moved on their own, but passed to the part's `place` as the argument `name`.
    """
    out = {}
    for key, value in batch.items():
        owner, dot, _ = key.rpartition(".")
        if dot and owner in batch:
            continue
        extras = {name.removeprefix(f"{key}."): extra for name, extra in batch.items() if name.startswith(f"{key}.")}
        part = parts.get((part_of or {}).get(key, key))
        out[key] = part.place(value, device, **extras) if part else value.to(device, non_blocking=True)
    return out
