"""How long a collective may take: long until the first step is done (data, compilation and connections are cold), short after it.

A process that waits longer ends with an error that names itself and its step, where the backend raises (gloo); NCCL's calls return at once, so there
the process group's own watchdog ends the process and names it in its log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

FIRST = timedelta(minutes=30)
_HANGS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")
_patient: set[dist.ProcessGroup] = set()


def patient_group() -> dist.ProcessGroup:
    """A gloo group of all processes whose time-out stays long: for saves, where one process may write for minutes."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=FIRST)  # type: ignore[assignment]
    _patient.add(group)
    return group


def shorten(seconds: float) -> None:
    """Set the time-out of all process groups but patient ones, after the first step; nothing where there are none.

    Before it the long one holds: `dist.init_process_group(..., timeout=timeouts.FIRST)`.
    """
    if dist.is_available() and dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            if group not in _patient:
                dist.set_timeout(timedelta(seconds=seconds), group)


class CollectiveError(RuntimeError):
    """A collective that another process never joined, or left by dying."""


@contextlib.contextmanager
def at_step(step: int) -> Iterator[None]:
    """Around a step: an error of a collective inside it says which process waited, and at which step."""
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError is one, too
        text = " ".join(str(error).split())
        if dist.is_available() and dist.is_initialized() and any(word in text.lower() for word in _HANGS):
            raise CollectiveError(
                f"process {dist.get_rank()} of {dist.get_world_size()} waited at step {step} for one that did not come: {text[:300]}"
            ) from error
        raise
