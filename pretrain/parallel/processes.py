"""The processes of a run: the process group, and small exchanges of Python objects and numbers between ranks.

torchrun, the local launcher or a cluster's job starts each process with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Without these variables the run has one process.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common.errors import UserError
from pretrain.parallel import silent_ranks, timeouts

T = TypeVar("T")
_patient: dist.ProcessGroup | None = None  # the group of `on_rank_0`; None: the default group
_joined: dist.Store | None = None
_asked = _started = 0  # how often `on_every_rank` and `start` were called; a store may outlive a process group


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world() -> int:
    """The number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def start(mode: str, device: torch.device, retry: float = 0.0) -> None:
    """Join the process group, unless `parallel.mode` is single. `device`: the device of this process.

    `retry`: seconds for which a rank repeats a request to a store, while the others wait for it.
    """
    if mode == "single":
        return
    timeouts.set_long(retry)
    global _patient, _started
    _started += 1
    store = dist.PrefixStore(f"group_{_started}", _store()) if "MASTER_ADDR" in os.environ else dist.HashStore()
    store.set_timeout(timeouts.long())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank(),
        world_size=world(),
        timeout=timeouts.long(),
        device_id=device if device.type == "cuda" else None,
    )
    silent_ranks.register_host()
    _patient = timeouts.patient_group()


def stop() -> None:
    """Destroy the process group, at the end of the run."""
    global _patient, _joined
    if dist.is_initialized():
        dist.destroy_process_group()
    timeouts.forget_groups()
    _patient = _joined = None


def _store() -> dist.Store:
    """The key-value store at the launcher's address, through which the ranks find each other."""
    global _joined
    if _joined is None:
        _joined, *_ = next(rendezvous("env://", rank(), world(), timeout=timeouts.long()))
    return _joined


def on_every_rank(ask: Callable[[], T]) -> T:
    """Run `ask` on every rank. A UserError on one rank is raised on all ranks, which otherwise would wait in their next
    collective for a rank that has ended. Collective: every rank must call it, before or after `start`; `ask` must not
    call collectives.
    """
    if world() == 1:
        return ask()
    global _asked
    _asked += 1
    error: UserError | None = None
    try:
        out = ask()
    except UserError as own:
        error = own
    keys = dist.PrefixStore(f"on_every_rank_{_asked}", _store())
    if error is not None:
        keys.set("error", pickle.dumps((rank(), error)))
        keys.add("errors", 1)
    if keys.add("done", 1) == world():
        keys.set("all_done", "")
    if not _wait_for(keys, "all_done", timeouts.long().total_seconds()):
        raise RuntimeError(f"rank {rank()} of {world()}: another rank has not come this far; see its log")
    count = keys.add("errors", 0)
    if not count:
        return out
    number, found = pickle.loads(keys.get("error"))
    if rank() == 0:  # this process holds the store, so it waits until the others have read the error
        _wait_for(keys, "all_read", 10.0)
    elif keys.add("read", 1) == world() - 1:
        keys.set("all_read", "")
    if count < world():
        found = type(found)(f"rank {number} of {world()}: {found}")
    raise raised_by_all(error if error is not None and count == world() else found) from None


def _wait_for(keys: dist.Store, key: str, seconds: float) -> bool:
    """Whether a key is set within so many seconds. The key is polled, because Python handles a signal only between two
    calls."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not keys.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)
    return True


def on_rank_0(ask: Callable[[], T]) -> T:
    """Run `ask` on rank 0 and broadcast the result; an exception there is raised on every rank. Collective: every rank
    must call it.

    The other ranks wait in a group whose time-out stays long, because rank 0 may read or write for minutes (an export).
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ask()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = ask()
        except UserError as error:
            box[1] = error
        except Exception:
            box[1] = RuntimeError(f"on rank 0: {traceback.format_exc()}")
    dist.broadcast_object_list(box, src=0, group=_patient)
    if box[1] is not None:
        raise raised_by_all(box[1]) if isinstance(box[1], UserError) else box[1]
    return box[0]


def raised_by_all(error: UserError) -> UserError:
    """Mark an error that every rank raises, so that only rank 0 prints it."""
    error.printed_by_rank_0 = rank() > 0
    return error


def gather(mine: T) -> list[T]:
    """All-gather Python objects: a list of every rank's `mine` in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, mine)
    return out


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks. May change `values` in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


class Agreement:
    """The maximum over ranks of one integer per rank and step, all-reduced while the ranks compute. It tells all ranks
    that one of them has to stop."""

    def __init__(self) -> None:
        self.many = dist.is_initialized() and dist.get_world_size() > 1
        # A separate gloo group: the number is in host memory, and the collectives of the training are not affected.
        # Its time-out is short, so that a rank that has lost its network between two collectives is noticed soon.
        self.group = dist.new_group(backend="gloo", timeout=timeouts.long()) if self.many else None
        self.largest = torch.zeros(1, dtype=torch.int32)
        self.pending: dist.Work | None = None

    def tell(self, mine: int) -> None:
        """Start the all-reduce of this rank's number. Collective: every rank must call it once in each step."""
        self.largest = torch.tensor([mine], dtype=torch.int32)
        if self.many:
            self.pending = dist.all_reduce(self.largest, dist.ReduceOp.MAX, self.group, async_op=True)

    def answer(self) -> int:
        """Wait for the all-reduce that `tell` has started. Returns the largest number of all ranks."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        return int(self.largest.item())
