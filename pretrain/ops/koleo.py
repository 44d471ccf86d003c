"""KoLeo regulariser: spread features evenly over the sphere (arXiv 1806.03198, as used in DINOv2, 2304.07193)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather, world


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean log ‖x_i − nearest neighbour of x_i‖ over L2-normalised rows of x [B, D], in fp32 or wider. 0 for a global batch of one.

    Neighbours are looked for among the rows of all processes, so that the loss does not depend on their number (DINOv2's was each GPU's own batch).
    """
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=eps)
    everyone, first = gather(x), len(x) * world()[0]
    if len(everyone) < 2:
        return x.sum() * 0.0
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # near neighbours are alike in bf16
        similarity = x @ everyone.T  # [B, W·B]
        similarity.diagonal(first).fill_(-torch.inf)
        nearest = similarity.argmax(dim=1)
    distance = (x - everyone[nearest] + eps).norm(dim=-1)  # eps inside: a finite gradient for duplicates
    return -(distance + eps).log().mean()
