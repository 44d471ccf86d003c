"""Sinkhorn-Knopp centring of a teacher's prototype logits (SwAV, arXiv 2006.09882; DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.gather import logsumexp_over_batch
from pretrain.ops.precision import wide


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [B, K] of B samples to K prototypes, from logits [B, K]: each row sums to 1, and all prototypes have
    approximately the same sum over the global batch. Of logits [B, N, K], each of the N columns [B, K] is assigned by
    itself (CAPI, arXiv 2502.08769). Collective: every rank must call it.

    Q starts as exp(logits / temperature). In each iteration, first the columns are scaled so that every prototype has
    the same sum over the global batch, then the rows so that every sample has the sum 1. (The papers scale the sums to
    1 / K and 1 / B; such constants cancel.) Everything is computed with log Q and logsumexp, so that finite logits never
    produce NaN.
    """
    log_q = wide(logits) / temperature
    limit = torch.finfo(log_q.dtype).max / 2**10  # far above real logits; keeps differences of two of them finite
    log_q.clamp_(-limit, limit)
    for _ in range(iterations):
        log_q -= logsumexp_over_batch(log_q.flatten(1)).view(1, *log_q.shape[1:])
        log_q -= log_q.logsumexp(-1, keepdim=True)
    return log_q.exp_()
