"""Starts and ends the processes that send a run to its trackers, one for each tracker. This module does not import
torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from common.child_signals import signals_blocked
from common.output import say
from pretrain.recipes.recipe import Recipe

FINISH_SECONDS = 60.0  # for what is left when a run has finished
ABORT_SECONDS = 5.0  # for what is left when a run is stopped or fails; the same command sends the rest


class Tracking:
    """A context in which the processes of `pretrain.trackers.sender` run, from `start` on. Only rank 0 of a run, or its
    launcher, starts them."""

    def __init__(self, recipe: Recipe):
        self.names = [tracker.name for tracker in recipe.log.trackers]
        self._processes: dict[str, subprocess.Popen] = {}

    def start(self, run: Path) -> None:
        for name in self.names:
            with signals_blocked():
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pretrain.trackers.sender", str(run.absolute()), name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=lambda: os.nice(10) and None,
                )

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Let the processes send what is left. One that does not end in time is killed."""
        deadline = time.monotonic() + (ABORT_SECONDS if kind else FINISH_SECONDS)
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
        for name, process in self._processes.items():
            problem = ""
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
                problem = f"the process that sends to it ended with code {code}, see log.txt" if code else ""
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                problem = "it did not take the rest in time"
            if problem:
                say(f"tracker {name}: {problem}; the same command sends what is left", file=sys.stderr)
        self._processes = {}
