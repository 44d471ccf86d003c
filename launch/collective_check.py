"""Check that the nodes of a job can compute together: `srun … python -m launch.collective_check GPUS SECONDS` joins one
process per node into a group, over NCCL with GPUs and over gloo without, and all-reduces a tensor. Rank 0 prints a line
that begins with ANSWER and holds {node: what is wrong} as JSON; it is empty if everything works. The all-reduce is in a
thread of its own, so that rank 0 also answers if NCCL hangs.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from common.output import say

NODES = "CHECKED_NODES"  # environment variable: the names of the nodes, by rank
ANSWER = "collective check: "  # begin of the line of rank 0; NCCL may print others
SIZE = 1 << 20  # number of elements of the tensor
SHARE_TO_JOIN = 0.6  # of the time, after which a node that has not joined is named
SHARE_TO_SUM = 0.9  # of the time, after which an all-reduce counts as failed


def main(gpus: int, seconds: float) -> int:
    """Run the check in this process. Returns 0, also if nodes are found that do not work."""
    import torch.distributed  # noqa: F401  # before the time begins, as a file system may need minutes for it

    names = os.environ[NODES].split(",")
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    rank = names.index(os.environ["SLURMD_NODENAME"])  # Slurm numbers the tasks in an order of its own
    if (found := check(rank, names, address, gpus, seconds)) is not None:
        say("", f"{ANSWER}{json.dumps(found)}")  # on a line of its own
    return 0


def check(
    rank: int, names: Sequence[str], address: tuple[str, int], gpus: int, seconds: float
) -> dict[str, str] | None:
    """Take part in the check of all nodes. `address`: host and port at which rank 0 listens. Returns
    {node: what is wrong} on rank 0, and None on the others."""
    import torch.distributed as dist

    began = time.monotonic()

    def left(share: float = 1.0) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(1.0, began + share * seconds - time.monotonic()))

    def client() -> Any:
        return dist.TCPStore(*address, len(names), False, left(SHARE_TO_JOIN), wait_for_workers=False)

    if rank == 0:
        server = dist.TCPStore(*address, len(names), True, left(SHARE_TO_JOIN), wait_for_workers=False)
    store = client()
    store.set(f"joined {rank}", "")
    if rank == 0:
        deadline = began + SHARE_TO_JOIN * seconds
        absent = [n for n in range(len(names)) if not _has(store, f"joined {n}", deadline)]
        store.set("absent", json.dumps(absent))
        if absent:
            return {names[n]: f"did not join the other nodes in {SHARE_TO_JOIN * seconds:g} s" for n in absent}
    else:
        store.set_timeout(left())
        if json.loads(store.get("absent")):
            return None

    def run(own: Any) -> None:
        try:
            _all_reduce(dist, own, rank, len(names), gpus, left(SHARE_TO_SUM))
            reason = ""
        except Exception as error:  # of torch, gloo or NCCL, which raise many kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            own.set(f"place {rank}", str(own.add("places", 1)))
        own.set(f"ended {rank}", reason)

    # with a client of its own, because a client that waits for a key does nothing else
    threading.Thread(target=run, args=(client(),), daemon=True).start()
    if rank:
        _has(store, "judged", began + seconds)  # the group is needed until all have ended
        return None
    found = _judge(store, names, began + seconds)
    del server
    return found


def _all_reduce(dist: Any, store: Any, rank: int, world: int, gpus: int, timeout: datetime.timedelta) -> None:
    """Raises an exception if the group cannot be made, or a sum over it is wrong."""
    import torch

    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    # NCCL's watchdog, which ends the process when a group has waited too long, must not come before the answer
    of_group = 10 * timeout if gpus else timeout
    group = dist.PrefixStore("group", store)
    dist.init_process_group("nccl" if gpus else "gloo", store=group, rank=rank, world_size=world, timeout=of_group)
    values = torch.full((SIZE,), float(rank + 1), device=device)
    work = dist.all_reduce(values, async_op=True)
    work.wait(timeout)
    wrong = int((values != world * (world + 1) / 2).sum())
    if wrong:
        raise ValueError(f"{wrong} of {SIZE} elements of a sum over all nodes are wrong")


def _judge(store: Any, names: Sequence[str], deadline: float) -> dict[str, str]:
    """{node: what is wrong}. If nodes do not end, they are the cause; otherwise the one that failed first: the others
    may have failed because they waited for it."""
    hung = [n for n in range(len(names)) if not _has(store, f"ended {n}", deadline)]
    reasons = {n: store.get(f"ended {n}").decode() for n in range(len(names)) if n not in hung}
    store.set("judged", "")
    if hung:
        return {names[n]: "joined the other nodes, but did not complete an all-reduce with them" for n in hung}
    failed = {n: int(store.get(f"place {n}")) for n, reason in reasons.items() if reason}
    if not failed:
        return {}
    first = min(failed, key=failed.__getitem__)
    return {names[first]: f"an all-reduce with the other nodes failed: {reasons[first]}"}


def _has(store: Any, key: str, deadline: float) -> bool:
    """Whether a key is set in the store before a time of the monotonic clock."""
    remaining = deadline - time.monotonic()
    if remaining <= 0.0:
        return store.check([key])
    try:
        store.wait([key], datetime.timedelta(seconds=remaining))
    except RuntimeError:  # DistStoreError, after the time
        return False
    return True


if __name__ == "__main__":
    code = main(int(sys.argv[1]), float(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads of a backend that hangs
