"""The precision of sums, norms and softmaxes, which bf16 and fp16 would round too much."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """The rows of x [..., D] at length 1, in fp32 or wider."""
    return F.normalize(wide(x), dim=-1)
