"""Signals that ask a run to stop.

A scheduler sends them to all processes of the run: the trainer handles them, its child processes ignore them and are
ended by the trainer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block these signals, also in processes that are started in the context, until they call `ignore` or
    `deliver_pending`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def deliver_pending() -> None:
    """Unblock these signals for this thread. Pending ones are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore() -> None:
    """Called in a child process of the trainer: ignore these signals, and write the stacks to stderr at SIGUSR2."""
    for number in SIGNALS[:-1]:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    deliver_pending()


def end_with_parent() -> None:
    """Called in a process that `multiprocessing` has started: end it as soon as the parent has ended, also by SIGKILL.

    A forked child holds copies of the parent's sockets. As long as it lives, the other ranks of the run wait, because
    no connection is closed.
    """
    import multiprocessing  # here, as every command imports this file and only data workers come here

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
