"""KoLeo regulariser: spread features evenly over the sphere (arXiv 1806.03198, as used in DINOv2, 2304.07193)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather, world


def koleo(x: Tensor, group: int | None = None, neighbours: int = 1, eps: float = 1e-8) -> Tensor:
    """-mean log ‖x_i − neighbour of x_i‖ over L2-normalised rows of x [B, D] and their `neighbours` nearest ones, in fp32 or wider.

    Neighbours are looked for among the rows of all processes, put one below the other in rank order, and with `group` in groups of so many of them. So
    the loss does not depend on the number of processes: where the papers' was each GPU's own batch, `group` is the size of that (DINOv2; DINOv3: 16
    rows, also where a process has only 8 of them). Its mean over processes is that of the whole batch. 0 for a global batch of one.
    """
    x = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=eps)
    count = len(x) * world()[1]
    if count < 2:
        return x.sum() * 0.0
    size = count if group is None else group
    if size < 2 or count % size or not 0 < neighbours < size:
        raise ValueError(
            f"KoLeo over groups of {size} with {neighbours} neighbours: the {count} rows of all processes must divide into groups of 2 or more, and a"
            " row has fewer neighbours than its group has rows"
        )
    # rows to compare, and the groups that these and their neighbours are in; where no group has rows of other processes, there is nothing to gather
    rows = x if len(x) % size == 0 else gather(x)
    groups = rows.view(-1, size, x.shape[1])  # [G, size, D]
    first = len(x) * world()[0] if len(rows) > len(x) and size == count else 0
    own = x.unsqueeze(0) if size == count else groups  # of one group, only this process's rows
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # near neighbours are alike in bf16
        similarity = own @ groups.transpose(1, 2)  # [G, rows, size]
        similarity.diagonal(first, dim1=1, dim2=2).fill_(-torch.inf)
        nearest = similarity.topk(neighbours, dim=2).indices  # [G, rows, neighbours]
    start = torch.arange(len(groups), device=x.device).view(-1, 1, 1) * size
    other = rows[(nearest + start).flatten(0, 1)]  # [R, neighbours, D]
    distance = (own.flatten(0, 1).unsqueeze(1) - other + eps).norm(
        dim=-1
    )  # eps inside: a finite gradient for duplicates
    return -(distance + eps).log().mean()
