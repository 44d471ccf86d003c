"""KoLeo regulariser: spread features evenly over the sphere (arXiv 1806.03198, as used in DINOv2, 2304.07193)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean log ‖x_i − nearest neighbour of x_i‖ over L2-normalised rows of x [B, D], in fp32 or wider. 0 for a batch of one."""
    if len(x) < 2:
        return x.sum() * 0.0
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=eps)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # near neighbours are alike in bf16
        similarity = x @ x.T
        nearest = similarity.fill_diagonal_(-torch.inf).argmax(dim=1)
    distance = (x - x[nearest] + eps).norm(dim=-1)  # eps inside: a finite gradient for duplicates
    return -(distance + eps).log().mean()
