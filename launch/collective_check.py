"""Check that the nodes of a job can compute together: `srun … python -m launch.collective_check GPUS SECONDS` joins one
process per node into a group, over NCCL with GPUs and over gloo without, and all-reduces a tensor. Rank 0 prints one
line of JSON, {node: what is wrong}; it is empty if everything works. The supervisor ends processes that hang.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from typing import Any

from common.output import say

NODES = "CHECKED_NODES"  # environment variable: the names of the nodes, by rank
SIZE = 1 << 20  # number of elements of the tensor
SHARE_TO_JOIN = 0.6  # of the time, after which a node that has not joined is named


def main(gpus: int, seconds: float) -> int:
    """Run the check in this process. Returns 0, also if nodes are found that do not work."""
    began = time.monotonic()
    import torch.distributed as dist

    rank, world, node = (os.environ[name] for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME"))
    number, count = int(rank), int(world)

    def left(share: float = 1.0) -> datetime.timedelta:
        return datetime.timedelta(seconds=max(1.0, began + share * seconds - time.monotonic()))

    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store = dist.TCPStore(*address, count, number == 0, left(SHARE_TO_JOIN), wait_for_workers=False)
    store.set(f"joined {rank}", node)
    if number == 0:
        names = os.environ[NODES].split(",")
        absent = [n for n in range(count) if not _has(store, f"joined {n}", left(SHARE_TO_JOIN))]
        store.set("absent", json.dumps(absent))
        if absent:
            say(
                json.dumps({names[n]: f"did not join the other nodes in {SHARE_TO_JOIN * seconds:g} s" for n in absent})
            )
            return 0
    elif json.loads(store.get("absent")):
        return 0
    try:
        _all_reduce(dist, store, number, count, gpus, left(0.9))
        store.set(f"ended {rank}", "")
    except Exception as error:  # of torch, gloo or NCCL, which raise many kinds
        store.set(f"place {rank}", str(store.add("places", 1)))
        store.set(f"ended {rank}", " ".join(str(error).split())[:300])
    if number == 0:
        say(json.dumps(_judge(store, names, left)))
        return 0
    _has(store, "judged", left())  # the store is in the process of rank 0
    return 0


def _all_reduce(dist: Any, store: Any, rank: int, world: int, gpus: int, timeout: datetime.timedelta) -> None:
    """Raises an exception if the group cannot be made, or a sum over it is wrong."""
    import torch

    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    group = dist.PrefixStore("group", store)
    dist.init_process_group("nccl" if gpus else "gloo", store=group, rank=rank, world_size=world, timeout=timeout)
    values = torch.full((SIZE,), float(rank + 1), device=device)
    work = dist.all_reduce(values, async_op=True)
    work.wait(timeout)
    wrong = int((values != world * (world + 1) / 2).sum())
    if wrong:
        raise ValueError(f"{wrong} of {SIZE} elements of a sum over all nodes are wrong")


def _judge(store: Any, names: list[str], left: Any) -> dict[str, str]:
    """{node: what is wrong}. If nodes do not end, they are the cause; otherwise the one that failed first: the others
    may have failed because they waited for it."""
    hung = [n for n in range(len(names)) if not _has(store, f"ended {n}", left())]
    reasons = {n: store.get(f"ended {n}").decode() for n in range(len(names)) if n not in hung}
    store.set("judged", "")
    if hung:
        return {names[n]: "joined the other nodes, but did not complete an all-reduce with them" for n in hung}
    failed = {n: int(store.get(f"place {n}")) for n, reason in reasons.items() if reason}
    if not failed:
        return {}
    first = min(failed, key=failed.__getitem__)
    return {names[first]: f"an all-reduce with the other nodes failed: {reasons[first]}"}


def _has(store: Any, key: str, timeout: datetime.timedelta) -> bool:
    """Whether a key is set in the store within a time."""
    try:
        store.wait([key], timeout)
    except RuntimeError:  # DistStoreError, after the time
        return False
    return True


if __name__ == "__main__":
    code = main(int(sys.argv[1]), float(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads of a backend that hangs
