"""Which ranks no longer answer, found after a collective has failed: every rank that sees that reports it to the store
through which the ranks have found each other. A rank that does not report it hangs, or has lost its host or its network.
"""

from __future__ import annotations

import os
import socket
import threading
import time

import torch.distributed as dist

REPORT_SECONDS = 3.0  # after a time-out: time in which all ranks that still run report
DIED = "another rank died (see its log)"


def host() -> str:
    """The name of this host; in a Slurm job, that of its node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def register_host() -> None:
    """Tell the other ranks on which host this rank runs. To be called when it has joined the process group."""
    _store().set(f"host_{dist.get_rank()}", host())


def cause_of_failure(timed_out: bool) -> str:
    """Report that a collective of this rank has failed. Returns the cause as text: after a time-out, the ranks that do not
    report that, and their hosts. Takes at most 2 × REPORT_SECONDS, and nearly no time if no rank has timed out."""
    store, rank, world, found = _store(), dist.get_rank(), dist.get_world_size(), list[str]()

    def ask() -> None:
        try:
            found.append(_ask(store, rank, world, timed_out))
        except RuntimeError:  # the process that holds the store has ended
            found.append(DIED)

    asking = threading.Thread(target=ask, daemon=True)  # without a network a request may wait forever
    asking.start()
    asking.join(2 * REPORT_SECONDS)
    if found:
        return found[0]
    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"no answer from the store of the ranks at {at}: its process hangs, or its host or the network is lost"


def _ask(store: dist.Store, rank: int, world: int, timed_out: bool) -> str:
    """The first rank that has timed out waits for the reports of the others, and tells them the result."""
    store.set(f"failed_{rank}", "")
    if store.add("failed", 1) == world:
        store.set("all_failed", "")
    if timed_out and store.add("timed_out", 1) == 1:
        _wait_for(store, "all_failed", REPORT_SECONDS)
        silent = [n for n in range(world) if not store.check([f"failed_{n}"])]
        names = [f"rank {n} on {store.get(f'host_{n}').decode()}" for n in silent]
        store.set("silent", f"no answer from {', '.join(names)}" if names else "all ranks answer")
    elif store.add("timed_out", 0):
        _wait_for(store, "silent", 1.5 * REPORT_SECONDS)
    text = store.get("silent").decode() if store.check(["silent"]) else DIED
    if rank == 0 and text != DIED:  # this process may hold the store, from which the others read
        time.sleep(REPORT_SECONDS / 3)
    return text


def _wait_for(store: dist.Store, key: str, seconds: float) -> None:
    """Wait until a key is set, at most so many seconds."""
    deadline = time.monotonic() + seconds
    while not store.check([key]) and time.monotonic() < deadline:
        time.sleep(0.1)


def _store() -> dist.Store:
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store
