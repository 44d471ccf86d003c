"""The device that a run computes on: its choice, its threads and memory, and which precision is faster on it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import time

import torch

from common.errors import ConfigError
from common.process_pool import cores
from common.untrusted import is_number
from pretrain.objectives.base import Batch, Objective


def scoring_device(asked: str, trainer: str) -> str:
    """The device, as a name for `pick_device`, of a process that scores beside a trainer: `eval.device`, where auto is
    the CPU if the trainer's `device` is an accelerator, whose memory the training may need."""
    if asked != "auto":
        return asked
    training_device = trainer if trainer != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return "auto" if training_device == "cpu" else "cpu"


def pick_device(name: str, mode: str = "single", key: str = "device") -> torch.device:
    """The device of this process: the recipe's `device` or, if that is cuda and `parallel.mode` is not single, the GPU
    with the number LOCAL_RANK. Raises ConfigError.

    The device becomes the current one before anything is allocated: an allocation creates a CUDA context on the current
    device, so that otherwise each rank would take about half a GB of GPU 0.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and mode != "single":
            device = torch.device("cuda", _own_gpu())
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{key} = {name!r}: cannot be used here ({str(error).splitlines()[0]}); write {key}=cpu or {key}=auto"
        ) from None
    return device


def _own_gpu() -> int:
    """LOCAL_RANK, the number of this process on its machine. Raises ConfigError if there are too few GPUs."""
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if 0 < count <= index:
        raise ConfigError(
            f"process {index} of this machine (LOCAL_RANK, from 0) has no GPU of its own: {count} can be seen;"
            f" start {count} processes, or write device=cpu"
        )
    return index


def threads(processes: int = 1) -> int:
    """The number of threads for each of `processes` on this machine: OMP_NUM_THREADS if it is set, otherwise an equal
    share of the usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if is_number(asked) and int(asked):
        return int(asked)
    return max(1, cores() // processes)


def keep_freed_memory() -> None:
    """Let the C library (glibc) keep freed memory for later tensors, as CUDA's caching allocator does.

    By default it returns large blocks to the system, which zeroes each page again at its next use: 2 to 6 % of a CPU
    step, 25 % on a busy machine. Call it before the model is built, so that the weights are in such memory, too.
    """
    trim_threshold, max_mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)
        mallopt(max_mappings, 0)


def bf16_possible(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def set_tf32(allowed: bool) -> None:
    """Set whether GPUs may round the inputs of fp32 matrix products and convolutions to TF32, which has 10 bits of
    mantissa.

    The engine allows it unless `precision` is fp32: if bf16 (7 bits) or fp16 (10 bits) is precise enough for most
    products, TF32 is precise enough for the others (losses outside of autocast, Gram matrices, logits), and it is about
    seven times as fast as fp32. By default torch allows it in convolutions only.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def precision_of(device: torch.device) -> str | None:
    """The value of `precision: auto` on a device: bf16 on an accelerator that supports it, fp32 on any device that does
    not. None for a CPU that supports bf16, on which `faster_precision` has to measure."""
    if not bf16_possible(device):
        return "fp32"
    return None if device.type == "cpu" else "bf16"


def faster_precision(objective: Objective, batch: Batch, repeats: int = 3) -> str:
    """The faster precision, "fp32" or "bf16", for forward and backward of this objective with this batch on this CPU.

    Each is measured on a copy of the objective: the shortest of `repeats` runs after one warm-up counts.
    """
    trial, seconds = copy.deepcopy(objective), {}
    for precision in ("fp32", "bf16"):
        times = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = trial(batch, 0)
            loss.backward()
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times[1:])
    return min(seconds, key=seconds.__getitem__)
