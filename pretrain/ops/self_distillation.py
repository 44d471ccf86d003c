"""DINO's and iBOT's terms, and what tells of a collapse. Shapes: B images, G global and L local crops each, M masked patches in the batch, K prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.layers import Features
from pretrain.ops.gather import gather

Head = Callable[
    ..., Tensor
]  # (rows [R, D], targets [R / n, K], temperature, row_weights [R]) → the sum of their cross-entropies


def dino_terms(head: Head, x_global: Tensor, x_local: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(local term, global term) of the student's class tokens [B, G or L, D] and teacher assignments p [B, G, K] (DINO, arXiv 2104.14294, eq. 3).

    Cross-entropies weighted by their number of (student, teacher) pairs, the same crop left out: their sum is the mean over all pairs. −Σ p log softmax(s)
    is linear in p, so the teacher crops that a student crop is compared with are averaged first.
    """
    crops, small = x_global.shape[1], x_local.shape[1]
    pairs_global, pairs_local = crops * (crops - 1), crops * small
    others = (p.sum(1, keepdim=True) - p) / (crops - 1)  # [B, G, K]
    glob = head(x_global.flatten(0, 1), others.flatten(0, 1), temperature) / (len(p) * crops)
    if not small:
        return glob * 0, glob
    local = head(x_local.flatten(0, 1), p.mean(1), temperature) / (len(p) * small)
    total = pairs_global + pairs_local
    return local * pairs_local / total, glob * pairs_global / total


def ibot_term(head: Head, x: Tensor, p: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student's tokens [M, D] and teacher assignments [M, K] at the patches that mask [B·G, N] names (iBOT, arXiv 2111.07832).

    Averaged over each image's own masked patches, summed over images, divided by all of them, masked or not.
    """
    weight = (1 / mask.sum(1).clamp_min(1)).unsqueeze(1).expand_as(mask)[mask]  # [M]
    return head(x, p, temperature, weight) / len(mask)


def by_image(features: list[Features], crops: int) -> tuple[Tensor, Tensor]:
    """Class tokens [B, G, D] and [B, L, D] of the features of B·G global and B·L local crops, of which there may be none."""
    cls = features[0].cls.unflatten(0, (-1, crops))
    if len(features) == 1:
        return cls, cls[:, :0]
    return cls, features[1].cls.unflatten(0, (len(cls), -1))


@torch.no_grad()
def health(cls: Tensor, p: Tensor) -> dict[str, Tensor]:
    """Scalars that show a collapse, of class tokens [B, D] and assignments p [B, K]; the tokens of all processes together.

    teacher_entropy: the mean entropy of a row of p, ln K where the teacher says nothing. feature_std: √D × the standard deviation of a coordinate of the
    normalised tokens over the batch, 1 where they spread in all directions, 0 where they are all alike. rank: (Σλ)² / Σλ² over the eigenvalues λ of
    their covariance, the number of directions they really use (at most the batch size).
    """
    x = F.normalize(gather(cls.float()), dim=-1)
    x = x - x.mean(0)
    with torch.autocast(x.device.type, enabled=False):
        products = x @ x.T
    return {
        "teacher_entropy": -(p * p.clamp_min(1e-12).log()).sum(-1).mean(),
        "feature_std": x.square().mean(0).sum().sqrt(),  # of a coordinate √(that / D), times √D
        "rank": products.trace() ** 2 / products.square().sum().clamp_min(1e-12),
    }
