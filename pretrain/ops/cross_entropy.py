"""Cross-entropy against soft targets, as self-distillation needs it."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """-Σ_k targets_k · log softmax(logits / temperature)_k per row: [...] from [..., K] and targets whose rows sum to 1.

    Written as logsumexp − Σ targets · logits, which never holds the log-softmax; at least fp32.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return logits.logsumexp(-1) - (targets * logits).sum(-1)
