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


def grouped_koleo(x: Tensor, group: int, neighbours: int = 1, eps: float = 1e-8) -> Tensor:
    """KoLeo among groups of `group` rows of the batch of all processes, over each row's `neighbours` nearest ones: the mean over rows and neighbours.

    x [B, D] of each process, put one below the other in rank order and cut into groups (DINOv3, arXiv 2508.10104: 16 rows, also where a process has
    only 8 of them). The same value on all processes; its mean gradient over them is that of the whole batch. Raises ValueError where it does not divide.
    """
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=eps)
    everyone = gather(x)
    if group < 2 or len(everyone) % group or not 0 < neighbours < group:
        raise ValueError(
            f"KoLeo over groups of {group} with {neighbours} neighbours: the {len(everyone)} rows of all processes must divide into groups of 2 or"
            " more, and a row has fewer neighbours than its group has rows"
        )
    groups = everyone.view(-1, group, x.shape[1])  # [G, group, D]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        similarity = groups @ groups.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = similarity.topk(neighbours, dim=2).indices  # [G, group, neighbours]
    first = torch.arange(len(groups), device=x.device).view(-1, 1, 1) * group
    other = everyone[(nearest + first).view(-1, neighbours)]  # [W·B, neighbours, D]
    distance = (everyone.unsqueeze(1) - other + eps).norm(dim=-1)
    return -(distance + eps).log().mean()
