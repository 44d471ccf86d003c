"""Processes for tests that need torch. They are forked from a server that has imported the trainer once, because
importing it takes seconds. They can be killed, stopped and waited for like other processes. A test of a command
starts that command instead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# OpenMP reads its variables when torch is imported; Python 3.11 does not pass sys.path on to the server
SERVER = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pretrain.train", "launch.cli", "tests.parallel.modes", "tests.faults.killer", "tests.freeze"]
)


class Forked:
    """A process that calls `function(*args)` and exits with the result or the error; `launch.local.wait` accepts it
    like a Popen. `env`: variables in addition to those of the test. `output`: files for standard output and error;
    by default those of the test."""

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        env: dict[str, str] | None = None,
        output: tuple[str, str] | None = None,
        cwd: Path | None = None,
    ):
        before = dict(os.environ)
        os.environ.update(SERVER)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self._process = _context.Process(target=_enter, args=(function, args, settings, output, cwd or Path.cwd()))
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or the negative number of the signal that ended the process. After `timeout` seconds the
        process is killed, and TimeoutError is raised."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"a forked process did not end in {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _enter(
    function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], output: tuple[str, str] | None, cwd: Path
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # the default of a process that was not forked by a server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(output or (), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(function(*args))
