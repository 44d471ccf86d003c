"""Starts and ends the processes that send a run to its trackers, one for each tracker. This module does not import
torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.child_signals import signals_blocked
from common.output import say
from pretrain.recipes.recipe import Recipe
from pretrain.signals import Stopped
from pretrain.trackers.trackers import FAILED, FINISHED, STOPPED, UNCHANGED

SENDER = "pretrain.trackers.sender"  # the module that a process runs
FINISH_SECONDS = 60.0  # for what is left when a run has finished
ABORT_SECONDS = 5.0  # for what is left when a run is stopped or fails; the same command sends the rest


class Tracking:
    """A context in which the processes of `pretrain.trackers.sender` run, from `start` on. Only rank 0 of a run, or its
    launcher, starts them."""

    def __init__(self, recipe: Recipe):
        self.names = [tracker.name for tracker in recipe.log.trackers]
        self._processes: dict[str, subprocess.Popen] = {}
        self._outcome = ""  # "": an exception, or none, tells it

    def start(self, run: Path) -> None:
        """Start the processes. One that cannot be started is reported; the training goes on without it."""
        for name in self.names:
            try:
                with signals_blocked():
                    self._processes[name] = subprocess.Popen(
                        [sys.executable, "-P", "-m", SENDER, str(run.absolute()), name],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
            except OSError as error:
                self._report(name, f"the process that sends to it cannot be started ({error.strerror or error})")

    def ends_as(self, outcome: str) -> None:
        """Tell how the run has ended (FINISHED, STOPPED or FAILED, or UNCHANGED if it had ended before), if no exception
        leaves the context to tell it."""
        self._outcome = outcome

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the processes send what is left. One that does not end in time is killed, with its child processes."""
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        outcome = self._outcome or (FINISHED if kind is None else STOPPED if stopped else FAILED)
        seconds = FINISH_SECONDS if outcome in (FINISHED, UNCHANGED) else ABORT_SECONDS
        deadline = time.monotonic() + seconds
        try:
            for process in self._processes.values():
                with contextlib.suppress(OSError), process.stdin as pipe:  # type: ignore[union-attr]
                    pipe.write(f"{outcome} {seconds}\n".encode())
            for name, process in self._processes.items():
                try:
                    if code := process.wait(max(0.0, deadline - time.monotonic())):
                        self._report(name, f"the process that sends to it ended with code {code}, see log.txt")
                except subprocess.TimeoutExpired:
                    self._report(name, "it did not take the rest in time")
        finally:  # also at Ctrl-C
            for process in self._processes.values():
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self._processes = {}

    def _report(self, name: str, problem: str) -> None:
        with contextlib.suppress(OSError):  # standard error is closed
            say(f"tracker {name}: {problem}; the same command sends what is left", file=sys.stderr)
