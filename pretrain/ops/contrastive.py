"""Contrastive losses over a batch of pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather, world
from pretrain.ops.precision import unit


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, arXiv 2002.05709, eq. 1) of embeddings a, b [B, D] of two
    views.

    For each of the 2·B rows, the classes are all other rows of all ranks, and the target is the other view of the same
    sample. Returns the mean over this rank's rows; its mean over ranks is the loss of the global batch. Gradients also
    flow to the rows of other ranks.
    """
    z = torch.stack([a, b])  # [2, B, D]
    z = unit(z)
    first, count = len(a) * world()[0], len(a) * world()[1]
    all_rows = torch.cat([gather(z[0]), gather(z[1])])  # [2·W·B, D]
    with torch.autocast(z.device.type, enabled=False):  # bf16 would round similarities to 1/256, before the temperature
        logits = z.flatten(0, 1) @ all_rows.T / temperature  # [2·B, 2·W·B]
    columns_a = torch.arange(first, first + len(a), device=a.device)  # of this rank's samples, in their first view
    columns_b = columns_a + count  # in their second view
    logits = logits.scatter(1, torch.cat([columns_a, columns_b]).unsqueeze(1), -torch.inf)  # not the row itself
    return F.cross_entropy(logits, torch.cat([columns_b, columns_a]))
