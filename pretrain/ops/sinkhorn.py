"""Sinkhorn-Knopp centring of a teacher's prototype logits (SwAV, arXiv 2006.09882; DINOv2, 2304.07193)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.ops.gather import logsumexp_over_batch, sum_over_world


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments [B, K] whose rows sum to 1 and whose prototypes share the global batch evenly.

    Q ∝ exp(logits / temperature), then `iterations` times: each prototype's total over the batch of all processes is made equal, each
    sample's total is made equal. It runs on log Q, so that each sum is shifted by its own maximum: finite logits never give NaN.
    """
    log_q = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    most = torch.finfo(log_q.dtype).max / 2**10  # far beyond any logit, so that no difference of two is infinite
    log_q = log_q.clamp_(-most, most)
    samples = sum_over_world(torch.tensor(float(len(logits)), device=logits.device))
    for _ in range(iterations):
        log_q = log_q - logsumexp_over_batch(log_q) - math.log(logits.shape[1])
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - samples.log()
    return (log_q + samples.log()).exp()
