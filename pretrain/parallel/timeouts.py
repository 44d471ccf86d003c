"""Time-outs of collectives: long until the first step has been trained (the first data, compilation and connections
take time), and short afterwards.

With gloo, a rank that waits longer ends with an error that names its rank, host and step, and the ranks that do not
answer. NCCL calls return at once; if one does not finish in time, the watchdog of the process group ends the process
and names the rank in its log.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from pretrain.parallel.silent_ranks import cause_of_failure, host

FIRST = timedelta(minutes=30)
_long = FIRST  # time-out of all groups until the first step has been trained, and of patient groups
_TEXTS_OF_TIMEOUTS = ("timed out", "timeout")
_TEXTS_OF_HANGS = (*_TEXTS_OF_TIMEOUTS, "connection closed", "connection reset", "broken pipe")
_patient: set[dist.ProcessGroup] = set()


def set_long(retry: float) -> None:
    """Set the long time-out to half an hour or to twice `retry`, the seconds for which a rank repeats a request to a
    store, whichever is longer."""
    global _long
    _long = max(FIRST, 2 * timedelta(seconds=retry))


def long() -> timedelta:
    """The time-out of all process groups until the first step has been trained, and of patient groups."""
    return _long


def patient_group() -> dist.ProcessGroup:
    """A gloo group of all ranks whose time-out stays long: for saves and exports, where one rank may write for
    minutes."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_long)  # type: ignore[assignment]
    _patient.add(group)
    return group


def forget_groups() -> None:
    """To be called when the process groups are destroyed."""
    _patient.clear()


def shorten(seconds: float) -> None:
    """Set the time-out of all process groups except patient ones, after the first step. Does nothing without process
    groups.

    Until then the groups have the time-out that they were created with, `long()`.
    """
    if dist.is_available() and dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            if group not in _patient:
                group.set_timeout(timedelta(seconds=seconds))  # dist.set_timeout is new in torch 2.14


class CollectiveError(RuntimeError):
    """A collective failed because another rank died or did not join it in time."""


@contextlib.contextmanager
def at_step(step: int) -> Iterator[None]:
    """Around a step: turn an error of a collective inside it into a CollectiveError that names the rank, its
    host, the step and, after a time-out, the ranks that do not answer."""
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError is one, too
        text = " ".join(str(error).split())
        if dist.is_available() and dist.is_initialized() and any(word in text.lower() for word in _TEXTS_OF_HANGS):
            timed_out = any(word in text.lower() for word in _TEXTS_OF_TIMEOUTS)
            cause = cause_of_failure(timed_out)
            raise CollectiveError(
                f"rank {dist.get_rank()} of {dist.get_world_size()} on {host()}: a collective failed at step {step};"
                f" {cause}: {text[:300]}"
            ) from error
        raise
