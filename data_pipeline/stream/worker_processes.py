"""How data workers are started: forked from the trainer, forked from a server process without threads, or spawned.

A fork copies one thread and the locks of all of them. A trainer that has initialised CUDA and NCCL has many threads
that hold locks, and a CUDA context does not work in a forked process; so beside an accelerator the workers are forked
from a server (`multiprocessing`'s forkserver) that is started before, has imported what workers need, and does nothing
else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import types
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from typing import Literal

from common import child_signals

StartMethod = Literal["fork", "forkserver", "spawn"]


def start_method(asked: StartMethod | Literal["auto"], device: str) -> StartMethod:
    """The start method for a trainer on a type of device; auto: fork on a CPU, forkserver beside an accelerator."""
    if asked != "auto":
        return asked
    return "fork" if device == "cpu" else "forkserver"


def start_server(modules: Sequence[str]) -> None:
    """Start the server that forks data workers, unless it runs. It imports `modules` beside what this process does next.

    Signals are blocked in it and in its children until they call `child_signals.ignore`: one that is sent to all
    processes of a run must not end it. It ends when this process does.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    with child_signals.signals_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Let a process that is started in the context not import the main module of this one again, which would run a
    script that has no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
