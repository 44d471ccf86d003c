"""Statistics of the stream: how long the trainer waits for data and why. And a watchdog, which prints the stack traces
of all processes of the stream when no batch comes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from common import child_signals
from common.output import say

if TYPE_CHECKING:
    from data_pipeline.stream.prefetch_client import ServerProcess

GAUGES = ("held", "queue")  # counts whose last value is reported; all others are summed


class StreamStats:
    """Waiting times and counts of one process since the last `take`."""

    def __init__(self) -> None:
        self._waits: list[float] = []
        self._counts: Counter[str] = Counter()
        self._gauges: dict[str, int] = {}
        self._began = time.perf_counter()

    def add(self, wait: float, counts: dict[str, int]) -> None:
        """Add one micro-batch: the seconds that the trainer waited for it, and the counts of its worker."""
        self._waits.append(wait)
        for key, value in counts.items():
            if key in GAUGES:
                self._gauges[key] = value
            else:
                self._counts[key] += value

    def take(self, workers: int) -> tuple[dict[str, float], str]:
        """(figures of this process since the last call, a line that names the bottleneck)."""
        seconds = time.perf_counter() - self._began
        waits, counts, gauges = np.array(self._waits or [0.0]), self._counts, self._gauges
        self.__init__()  # type: ignore[misc]
        figures: dict[str, float] = {
            "wait_ms_p50": round(1e3 * float(np.quantile(waits, 0.5)), 2),
            "wait_ms_p99": round(1e3 * float(np.quantile(waits, 0.99)), 2),
            "mb": round(counts["bytes"] / 1e6, 2),
        }
        figures |= {key: counts[key] for key in ("requests", "retries", "hedges", "hits")}
        if gauges:
            figures |= {"held_mb": round(gauges.get("held", 0) / 1e6, 1), "queue": gauges.get("queue", 0)}
        return figures, self._bottleneck(waits.sum() / seconds, counts, workers)

    @staticmethod
    def _bottleneck(share: float, counts: Counter[str], workers: int) -> str:
        read, views = counts["read_us"], counts["views_us"]
        of_workers = (
            f"workers spend {read / max(1, read + views):.0%} of their time on reading, the rest on decoding and views"
        )
        if share < 0.05:
            return f"the model is the bottleneck: {share:.0%} of the time is waiting for data"
        if read > views:
            return (
                f"the store is the bottleneck: {share:.0%} of the time is waiting for data, {of_workers}; more"
                " data.fetch.requests or ahead_mb may help"
            )
        return (
            f"decoding and views are the bottleneck: {share:.0%} of the time is waiting for data, {of_workers}; more"
            f" than {workers} data.workers may help"
        )


class Watchdog:
    """Writes the stacks of trainer, data workers and prefetch server to stderr when no batch has come for `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since: float | None = None
        self._step = 0
        self._pids: list[int] = []  # of the data workers and the prefetch server
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    def start_worker(_: int) -> None:
        """Set up a data worker: one thread per library, stack traces on SIGUSR2, and the worker ends with the
        trainer."""
        import cv2
        import torch

        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        child_signals.ignore()
        child_signals.end_with_parent()

    def watch(self, workers: list[int], server: ServerProcess | None) -> None:
        """Watch data workers, by process id, and a prefetch server."""
        self._pids = workers + ([server.process.pid] if server else [])
        if self._thread is None:
            self._closed.clear()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread = None

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """The context in which the trainer waits for a batch of `step`."""
        self._since, self._step = time.monotonic(), step
        try:
            yield
        finally:
            self._since = None

    def _run(self) -> None:
        while not self._closed.wait(min(5.0, self.seconds / 4)):
            since = self._since
            if since is None or time.monotonic() - since < self.seconds:
                continue
            say(
                f"no batch for {self.seconds:.0f} seconds before step {self._step}; the stack traces of all processes:",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(all_threads=True)
            for pid in self._pids:
                try:
                    os.kill(pid, signal.SIGUSR2)
                except ProcessLookupError:
                    say(f"process {pid} of the stream has ended", file=sys.stderr)
            self._since = None if self._since is None else time.monotonic()
