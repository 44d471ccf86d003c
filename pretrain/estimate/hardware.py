"""Peak FLOP/s of a device: from a table for known GPUs (dense matrix products, without sparsity), measured by a matrix
product for anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# FLOP/s of dense matrix products as vendors state them: (bf16, fp32; tf32 is not used)
PEAKS: dict[str, tuple[float, float]] = {
    "b200": (2250e12, 75e12),
    "h200": (989e12, 67e12),
    "h100 pcie": (756e12, 51e12),
    "h100 nvl": (835e12, 60e12),
    "h100": (989e12, 67e12),
    "a100": (312e12, 19.5e12),
    "l40s": (362e12, 91.6e12),
    "l4": (121e12, 30.3e12),
    "a10g": (70e12, 31.2e12),
    "a10": (125e12, 31.2e12),
    "v100": (0.0, 15.7e12),  # no bf16
    "rtx 4090": (165e12, 82.6e12),
    "rtx 3090": (71e12, 35.6e12),
}

# Other devices are measured by products of two n × n matrices, of these sizes n.
SIZES = (4096, 8192, 12288)
CPU_SIZES = (512, 1024, 1536)
QUEUED, REPEATS = 8, 3  # products that are queued on a device at a time; measurements of each size
MAX_SECONDS = 1.0  # time limit of the measurements of one size, without the warm-up


def peak_of(name: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU by its name ("NVIDIA H100 80GB HBM3" is an h100). None if the GPU is not in the table or
    does not support this precision."""
    words = name.lower().replace("-", " ")
    for known in sorted(PEAKS, key=len, reverse=True):  # "h100 pcie" before "h100"
        if f" {known} " in f" {words} ":
            return PEAKS[known][0 if precision in ("bf16", "fp16") else 1] or None
    return None


def measured(device: torch.device, precision: str, sizes: Sequence[int] | None = None) -> tuple[float, int]:
    """(FLOP/s, size) of the fastest of several matrix products [size, size] · [size, size] on this device, with the
    current number of threads.

    `sizes`: the defaults are so large that a GPU computes for longer than the launch of a kernel takes, and small
    enough for a CPU.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    found = []
    for size in sizes or (CPU_SIZES if device.type == "cpu" else SIZES):
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        found.append((2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device), size))  # type: ignore[misc]
    return max(found)


def _seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The shortest time of a call. On a CPU single calls are timed. On other devices QUEUED calls are timed together,
    so that kernels are launched while the device computes, and the result is divided by QUEUED."""
    queued = 1 if device.type == "cpu" else QUEUED
    best, began = float("inf"), time.perf_counter()
    for turn in range(1 + REPEATS):
        start = time.perf_counter()
        for _ in range(queued):
            out = work()
        if device.type != "cpu":
            out[0, 0].item()  # waits for all of them
        if turn:  # the first turn is a warm-up
            best = min(best, (time.perf_counter() - start) / queued)
            if time.perf_counter() - began > MAX_SECONDS:
                break
    return best


def peak(device: torch.device, precision: str) -> tuple[float, str]:
    """(peak FLOP/s of a device, a text about the source of the figure): from the table for a known GPU, otherwise the
    rate of a matrix product, measured now."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if known := peak_of(name, precision):
        return known, f"of the data sheet of {name}"
    rate, size = measured(device, precision)
    return rate, f"measured on this {name} with a {precision} product of {size}³"
