"""Engine: how an objective runs on its processes and devices: precision, accumulation, gradients, the optimizer's step, and its state.

The loop and the objectives know nothing of it; a new way to spread a run is a class with these methods.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pretrain.config import ConfigError
from pretrain.objectives.base import Batch, Objective
from pretrain.optim import make_optimizer
from pretrain.recipe import Recipe


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device = {name!r}: cannot be used here ({str(error).splitlines()[0]}); write device=cpu or device=auto"
        ) from None
    return device


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep what tensors free for the next ones, as CUDA's allocator does.

    It returns large blocks to the system by default, which zeroes each page again when it is next needed: 2 to 6 % of a CPU step, 25 % when busy.
    Call it before the model is built, so that the weights lie in that memory, too.
    """
    trim_threshold, most_mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library: nothing to set
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(most_mappings, 0)


def accumulation(recipe: Recipe, couples_batch: bool, world: int = 1) -> int:
    """Micro-batches per step, from the global batch and the largest micro-batch that fits a process."""
    batch, micro = recipe.data.batch, recipe.parallel.micro_batch
    if micro is None:
        return 1
    if micro < 1 or batch % (world * micro):
        raise ConfigError(
            f"parallel.micro_batch = {micro}: data.batch = {batch} over {world} processes does not divide into it"
        )
    count = batch // (world * micro)
    if count > 1 and couples_batch and not recipe.parallel.accumulate_coupled:
        raise ConfigError(
            f"parallel.micro_batch = {micro}: the loss of {recipe.objective.name} couples the samples of a batch, so {count} micro-batches are not"
            f" one batch of {batch}; leave micro_batch out, or write parallel.accumulate_coupled=true if that is what you want"
        )
    return count


class Engine:
    """One process, one device (`parallel.mode: single`)."""

    def __init__(self, objective: Objective, recipe: Recipe, device: torch.device):
        self.objective = objective.to(device)
        self.device = device
        self.accumulate = accumulation(recipe, objective.couples_batch)
        self.precision = recipe.precision
        self.clip = recipe.optim.clip
        self.seed = recipe.seed
        self.optimizer = make_optimizer(objective, recipe.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients cross processes on the last only."""
        return contextlib.nullcontext()

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss and logs, in the compute precision. Dropout and drop path are seeded by the step, so a resumed run draws the same."""
        torch.manual_seed((self.seed << 32) + step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.objective(batch, step)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulate).backward()

    def step(self, lr: float, weight_decay: float, judge: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Clip, update, zero the gradients; the global gradient norm before clipping, still on the device.

        `judge` gets the norm, and where its answer (a scalar on the device) is 1.0, weights and optimizer state stay as they are.
        """
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["wd_scale"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = judge(norm) if judge else None  # type: ignore[attr-defined]  # fused optimizers look for it
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name, ready for DCP: the same keys in every mode."""
        model, optimizer = get_state_dict(self.objective, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.objective, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


def bf16_possible(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def faster_precision(objective: Objective, batch: Batch, device: torch.device, repeats: int = 3) -> str:
    """ "bf16" where the device has it and a forward and backward of this objective on this batch is faster with it, else "fp32".

    Measured on a copy, so that the objective stays as it was; the shortest of `repeats` after one to warm up. Accelerators are not timed.
    """
    if not bf16_possible(device):
        return "fp32"
    if device.type != "cpu":
        return "bf16"
    trial, seconds = copy.deepcopy(objective), {}
    for precision in ("fp32", "bf16"):
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = trial(batch, 0)
            loss.backward()
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times[1:])
    return min(seconds, key=seconds.__getitem__)
