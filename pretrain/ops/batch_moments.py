"""Mean and variance over the global batch, with gradients to the rows of all ranks."""

from __future__ import annotations

from torch import Tensor

from pretrain.ops.gather import all_reduce, world
from pretrain.ops.precision import wide


def centred(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """(x − mean [B, ...], variance [...], N) over the N rows of all ranks, for x [B, ...] with as many rows on each
    rank; in fp32 or wider.

    The variance is Σ (x − mean)² / N. Collective: every rank must call it.
    """
    x = wide(x)
    count = len(x) * world()[1]
    x = x - all_reduce(x.sum(0)) / count
    return x, all_reduce(x.square().sum(0)) / count, count
