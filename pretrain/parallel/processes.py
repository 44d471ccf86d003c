"""The processes of a run: how they find each other, and how they agree.

torchrun, the local launcher or a cluster's job starts each with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without these there is one.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.errors import UserError
from pretrain.parallel import timeouts

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def here() -> int:
    """How many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def start(mode: str, device: torch.device) -> torch.device:
    """Join the others, where `parallel.mode` is for several; the device of this process."""
    if mode == "single":
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone: dict[str, Any] = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore()}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=rank(),
        world_size=world(),
        timeout=timeouts.FIRST,
        device_id=device if device.type == "cuda" else None,
        **alone,
    )
    return device


def stop() -> None:
    """Leave the group, when all have come to their end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first(ask: Callable[[], T]) -> T:
    """What process 0 finds, on all of them; an error of its is theirs."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ask()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = ask()
        except UserError as error:
            box[1] = error
        except Exception:
            box[1] = RuntimeError(f"on process 0: {traceback.format_exc()}")
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise common(box[1]) if isinstance(box[1], UserError) else box[1]
    return box[0]


def common(error: UserError) -> UserError:
    """An error that all processes raise: process 0 says it."""
    error.said = rank() > 0
    return error


def gather(mine: T) -> list[T]:
    """What each process has, in the order of their ranks, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, mine)
    return out


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


class Agreement:
    """Whether any process has raised its flag, without waiting for it: the answer is that of the call before."""

    def __init__(self) -> None:
        self.many = dist.is_initialized() and dist.get_world_size() > 1
        # its own group on gloo: the flags stay in main memory, and no message of the training comes between them
        self.group = timeouts.patient_group() if self.many else None
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.pending: dist.Work | None = None

    def any(self, mine: bool) -> bool:
        if not self.many:
            return mine
        answer = self.settle()
        self.flag = torch.tensor([int(mine)], dtype=torch.int32)
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return answer

    def settle(self) -> bool:
        """Wait for the question that is still out; its answer."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        return bool(self.flag.item())
