"""KoLeo regulariser: spread features evenly over the sphere (arXiv 1806.03198, as used in DINOv2, 2304.07193)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather, world
from pretrain.ops.precision import wide


def koleo(x: Tensor, group: int | None = None, neighbours: int = 1, eps: float = 1e-8) -> Tensor:
    """−mean log ‖x_i − neighbour of x_i‖ over the L2-normalised rows of x [B, D] and the `neighbours` nearest rows of
    each, in fp32 or wider.

    The rows of all ranks are concatenated in rank order and divided into groups of `group` rows (None: one group);
    neighbours are searched within a group. The loss therefore does not depend on the number of ranks. The papers search
    within the batch of each GPU, whose size corresponds to `group` (DINOv3: 16). The mean over ranks is the loss of the
    global batch; it is 0 for a global batch of one row.
    """
    x = F.normalize(wide(x), dim=-1, eps=eps)
    count = len(x) * world()[1]
    if count < 2:
        return x.sum() * 0.0
    size = count if group is None else group
    if size < 2 or count % size or not 0 < neighbours < size:
        raise ValueError(
            f"KoLeo over groups of {size} with {neighbours} neighbours: the {count} rows of all processes must divide"
            " into groups of 2 or more, and a row has fewer neighbours than its group has rows"
        )
    # Gather only if a group has rows of several ranks.
    rows = x if len(x) % size == 0 else gather(x)
    groups = rows.view(-1, size, x.shape[1])  # [G, size, D]
    first = len(x) * world()[0] if len(rows) > len(x) and size == count else 0
    queries = x.unsqueeze(0) if size == count else groups  # with a single group, only this rank's rows
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for near neighbours
        similarity = queries @ groups.transpose(1, 2)  # [G, queries, size]
        similarity.diagonal(first, dim1=1, dim2=2).fill_(-torch.inf)  # a row is not its own neighbour
        nearest = similarity.topk(neighbours, dim=2).indices  # [G, queries, neighbours]
    start = torch.arange(len(groups), device=x.device).view(-1, 1, 1) * size
    others = rows[(nearest + start).flatten(0, 1)]  # [R, neighbours, D]
    # eps inside the norm keeps the gradient finite for duplicates
    distance = (queries.flatten(0, 1).unsqueeze(1) - others + eps).norm(dim=-1)
    return -(distance + eps).log().mean()
