"""The losses of DINO and iBOT, and metrics that reveal a collapse of the features.

Shapes: B images, G global and L local crops each, N patches of a global crop, M masked patches in the batch, D
features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gather import gather

# A head that computes a loss (heads.py): (rows [R, D], targets [R / n, K], temperature, row_weights [R]) → the sum of
# the cross-entropies of the rows. Target i serves the n consecutive rows from n · i on.
Head = Callable[..., Tensor]


def dino_terms(head: Head, x_global: Tensor, x_local: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss of local crops, loss of global crops), whose sum is DINO's loss (arXiv 2104.14294, eq. 3).

    x_global [B, G, D] and x_local [B, L, D] are the student's class tokens, p [B, G, K] the teacher's assignments.
    DINO's loss is the mean cross-entropy over all pairs of a student crop and a different teacher crop. The
    cross-entropy −Σ p log softmax(s) is linear in p, so the assignments of all teacher crops with which a student crop
    is paired are averaged first, and each student crop needs only one cross-entropy.
    """
    global_crops, local_crops = x_global.shape[1], x_local.shape[1]
    pairs_global, pairs_local = global_crops * (global_crops - 1), global_crops * local_crops
    others = (p.sum(1, keepdim=True) - p) / (global_crops - 1)  # [B, G, K]: mean over the other teacher crops
    global_loss = head(x_global.flatten(0, 1), others.flatten(0, 1), temperature) / (len(p) * global_crops)
    if not local_crops:
        return global_loss * 0, global_loss
    local_loss = head(x_local.flatten(0, 1), p.mean(1), temperature) / (len(p) * local_crops)
    total = pairs_global + pairs_local
    return local_loss * pairs_local / total, global_loss * pairs_global / total


def ibot_term(head: Head, x: Tensor, p: Tensor, weight: Tensor, crops: int, temperature: float) -> Tensor:
    """iBOT's loss (arXiv 2111.07832): the cross-entropy between the student's tokens x [M, D] and the teacher's
    assignments p [M, K] at the masked patches.

    It is averaged over the masked patches of each crop, then over all `crops`, including those without masked patches.
    `weight` [M] is 1 / (number of masked patches in the same crop); `masked_patches` in data_pipeline/views/masks.py
    returns it as `mask_weight`.
    """
    return head(x, p, temperature, weight) / crops


def select_patches(tokens: Tensor, indices: Tensor) -> Tensor:
    """The rows [M, D] of tokens [B, N, D] at `indices` [M] into the flattened B·N tokens. Unlike tokens[mask], this
    needs no host sync."""
    return tokens.flatten(0, 1).index_select(0, indices)


def by_image(cls: list[Tensor], crops: int) -> tuple[Tensor, Tensor]:
    """Class tokens grouped by image, [B, G, D] and [B, L, D], from `cls`, a list of the class tokens of the global
    crops, [B·G, D], and of the local crops, [B·L, D], if there are any. `crops`: G. Without local crops, L = 0."""
    first = cls[0].unflatten(0, (-1, crops))
    return (first, first[:, :0]) if len(cls) == 1 else (first, cls[1].unflatten(0, (len(first), -1)))


@torch.no_grad()
def health(cls: Tensor, p: Tensor | None = None) -> dict[str, Tensor]:
    """Scalars that reveal a collapse, from this rank's class tokens [B, D] and assignments p [B, K], if there are any.
    Collective: the class tokens are gathered from all ranks.

    teacher_entropy: the mean entropy of the rows of p; ln K if all prototypes are equally likely.
    feature_std: √D × the standard deviation of a coordinate of the L2-normalised tokens over the batch; 1 if they
    spread evenly in all directions, 0 if they are all equal. rank: the effective rank (Σλ)² / Σλ² over the eigenvalues
    λ of their covariance; at most the batch size.
    """
    x = F.normalize(gather(cls.float()), dim=-1)
    x = x - x.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        products = x @ x.T
    entropy = {} if p is None else {"teacher_entropy": -(p * p.clamp_min(1e-12).log()).sum(-1).mean()}
    return entropy | {
        "feature_std": x.square().mean(0).sum().sqrt(),  # √D · √(mean variance of a coordinate)
        "rank": products.trace() ** 2 / products.square().sum().clamp_min(1e-12),
    }
