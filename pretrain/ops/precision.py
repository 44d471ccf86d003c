"""The precision of sums, norms and softmaxes, which bf16 and fp16 would round too much."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()
