"""How data workers are started: forked from the trainer, forked from a server process without threads, or spawned.

A fork copies one thread and the locks of all of them. A trainer that has initialised CUDA and NCCL has many threads
that hold locks, and a CUDA context does not work in a forked process; so with an accelerator the workers are forked
from a server process (`multiprocessing`'s forkserver). It is started before CUDA is initialised, imports the modules
that workers need, and has one thread only.
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


def start_method(setting: StartMethod | Literal["auto"], device: str) -> StartMethod:
    """The start method for a trainer on this type of device. auto: fork on a CPU, forkserver with an accelerator."""
    if setting != "auto":
        return setting
    return "fork" if device == "cpu" else "forkserver"


def start_server(modules: Sequence[str]) -> None:
    """Start the server that forks data workers, unless it runs. It imports `modules` while this process continues.

    Signals are blocked in the server, and in each child until it calls `child_signals.ignore`: a signal that is sent to
    all processes of a run must not end the server. The server ends when this process does.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    with child_signals.signals_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep processes that are started in this context from importing the main module of this process again. The import
    would run the whole script if it has no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
