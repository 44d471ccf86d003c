"""Signals that stop a run: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to any of its processes. This module does not import
torch.

Before the first step such a signal ends the process at once, because there is nothing to save. Later it is recorded,
and the loop ends after the current step and a checkpoint. Only a wait for data is interrupted; with several ranks all
of them then skip the step (`pretrain.loop_step`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from common.child_signals import STOP_SIGNALS, deliver_pending

EXIT_STOPPED = 75  # exit code of a run that a signal has stopped; the same command resumes it
EXIT_UNSCORED = 76  # exit code of a finished run that lacks scores; the same command computes them
STOPPED_EARLY = "stopped as asked, before a step was trained; the same command starts it again"


class Stopped(BaseException):
    """Raised in the main thread by a signal that stops the run. A BaseException, so that no `except Exception` catches
    it."""

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number = number


class Stop:
    """A context in which signals stop the run. On exit, the previous handlers are restored.

    Only the main thread can install signal handlers; in another thread this context does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # the first signal that came
        self.deferred = False  # whether a signal is only recorded in `number`, instead of raising Stopped
        self.has_trained = False  # whether a step has been trained since the start
        self._former_handlers: dict[int, Any] = {}
        self._callback: Callable[[int], object] = lambda number: None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._former_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former_handlers = {}

    def _handle(self, number: int, frame: object) -> None:
        self.number = self.number or number
        self._callback(number)
        if not self.deferred:
            raise Stopped(self.number)

    def on_signal(self, callback: Callable[[int], object]) -> None:
        """Call `callback` with the number of each signal from now on, and of the signal that has already come, if
        any."""
        self._callback = callback
        if self.number is not None:
            callback(self.number)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the context, a signal raises Stopped, even one that came before; after the context, signals are
        deferred again."""
        self.deferred = False
        try:
            self.check()
            yield
        finally:
            self.deferred = True


def end_at_once() -> None:
    """Let a signal end this process with code 75 until a `Stop` is entered. For the time in which a program imports its
    modules."""
    for number in STOP_SIGNALS:
        signal.signal(number, _end)
    deliver_pending()


def _end(number: int, frame: object) -> None:
    os.write(2, f"{STOPPED_EARLY}\n".encode())
    os._exit(EXIT_STOPPED)
