"""Contrastive losses over a batch of pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather, world


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, arXiv 2002.05709, eq. 1) of embeddings a, b [B, D] of two
    views.

    The classes of each of the 2·B rows are all other rows of all ranks; the target is its other view. Returns the mean
    over this rank's rows: the mean over ranks is the loss of the global batch. Gradients also flow to the rows of other
    ranks.
    """
    z = torch.stack([a, b])  # [2, B, D]
    z = F.normalize(z if a.dtype == torch.float64 else z.float(), dim=-1)
    rank, count = len(a) * world()[0], len(a) * world()[1]
    everyone = torch.cat([gather(z[0]), gather(z[1])])  # [2·W·B, D]
    with torch.autocast(z.device.type, enabled=False):  # bf16 would round similarities to 1/256, before the temperature
        logits = z.flatten(0, 1) @ everyone.T / temperature  # [2·B, 2·W·B]
    own = torch.arange(rank, rank + len(a), device=a.device)
    self_column = torch.cat([own, own + count])
    logits = logits.scatter(1, self_column.unsqueeze(1), -torch.inf)
    return F.cross_entropy(logits, torch.cat([own + count, own]))
