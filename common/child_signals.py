"""Signals that ask a run to stop.

A scheduler sends them to all processes of the run: the trainer handles them, its child processes ignore them and are
ended by the trainer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block these signals, also in processes that are started in the context, until they call `ignore` or
    `deliver_pending`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGKILL or, of a real-time signal, SIGRTMIN+3."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def deliver_pending() -> None:
    """Unblock these signals for this thread. Pending ones are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def ignore() -> None:
    """Called in a child process of the trainer: ignore these signals, but on SIGUSR2 write the stacks of all threads to
    standard error."""
    for number in STOP_SIGNALS:
        if number != signal.SIGUSR2:
            signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    deliver_pending()


def input_closed(wait: float) -> bool:
    """Wait up to `wait` seconds for standard input to be closed, and return whether it is: the parent process closes it
    when it needs the child no longer, or has ended."""
    ready, _, _ = select.select([sys.stdin], [], [], wait)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


def end_with_parent() -> None:
    """Called in a process that `multiprocessing` has started: end this process as soon as its parent has ended, even if
    the parent was killed.

    A forked child holds copies of the parent's sockets. As long as it lives, no connection is closed, so that the other
    ranks of the run wait.
    """
    import multiprocessing  # not at the top: every command imports this file, but only data workers call this function

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
