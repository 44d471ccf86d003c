"""What a device can multiply at most: a table for known GPUs (dense, without sparsity), a product measured here for anything else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# FLOP/s of dense matrix products as vendors state them: (bf16, fp32; tf32 is not used)
PEAKS: dict[str, tuple[float, float]] = {
    "b200": (2250e12, 75e12),
    "h200": (989e12, 67e12),
    "h100 pcie": (756e12, 51e12),
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


def peak_of(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by its name ("NVIDIA H100 80GB HBM3" is an h100); None for one that the table does not have."""
    words = name.lower().replace("-", " ")
    for known in sorted(PEAKS, key=len, reverse=True):  # "h100 pcie" before "h100"
        if f" {known} " in f" {words} ":
            return PEAKS[known][0 if precision in ("bf16", "fp16") else 1] or None
    return None


def measured(device: torch.device, precision: str, size: int = 1024, repeats: int = 3) -> float:
    """FLOP/s of a size³ matrix product on this device, with the threads that are set: the best of a few."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(1 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        out = a @ b
        if device.type != "cpu":
            out[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak(device: torch.device, precision: str) -> float:
    """FLOP/s that model FLOP/s are compared with: the table's figure for a known GPU, else what a product reaches here."""
    import torch

    known = peak_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return known or measured(device, precision)
