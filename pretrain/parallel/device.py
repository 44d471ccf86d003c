"""The device that a run computes on: which one, how its memory is kept, and which precision is faster on it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import time

import torch

from pretrain.config import ConfigError
from pretrain.objectives.base import Batch, Objective


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
