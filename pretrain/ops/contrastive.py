"""Contrastive losses over a batch of pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.cross_entropy import cross_entropy
from pretrain.ops.gather import gather, world
from pretrain.ops.precision import unit

MAX_CHUNK_LOGITS = 1 << 26  # largest number of logits of pairs that exist at a time


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


def softmax_pairs(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross-entropy of pairs (CLIP, arXiv 2103.00020, figure 3), of rows a, b [B, D] of length 1.

    For row i of a, the classes are the rows of b of all ranks, with logits scale · aᵢ bⱼᵀ, and the target is its own
    partner; and the same for b. Returns the mean over this rank's rows; its mean over ranks is the loss of the global
    batch. Gradients also flow to the rows of other ranks. The logits of some of this rank's rows exist at a time: an
    eighth of [B, W·B], or less.
    """
    targets = torch.arange(len(a), device=a.device) + len(a) * world()[0]
    with torch.autocast(a.device.type, enabled=False):  # bf16 would round similarities to 1/256, before the scale
        total = cross_entropy(scale * a, gather(b), targets) + cross_entropy(scale * b, gather(a), targets)
    return total / (2 * len(a))


def sigmoid_pairs(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The sigmoid loss of all pairs (SigLIP, arXiv 2303.15343, eq. 1), of rows a, b [B, D] of length 1.

    A pair of row i of a and row j of b of all ranks is a binary classification with the logit scale · aᵢ bⱼᵀ + bias,
    whose target is 1 for partners and 0 otherwise. Returns the sum over pairs of this rank's rows of a, divided by B;
    its mean over ranks is the loss of the global batch. Gradients also flow to the rows of other ranks. The logits of
    one chunk exist at a time, [B, B] or less (§3.3).
    """
    with torch.autocast(a.device.type, enabled=False):
        return _SigmoidPairs.apply(a, gather(b), scale, bias) / len(a)


class _SigmoidPairs(torch.autograd.Function):
    """Σ softplus(z) − Σ over partners of z, for z = scale · a bᵀ + bias: −log sigmoid(z) is softplus(z) − z, and
    −log sigmoid(−z) is softplus(z). The gradients are computed in the forward, chunk by chunk of b [W·B, D]."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        count, first = len(a), len(a) * world()[0]  # this rank's rows, and where their partners begin in b
        loss = torch.zeros((), dtype=a.dtype, device=a.device)
        grads = [torch.zeros_like(x) for x in (a, b, scale, bias)]
        size = max(1, min(count, MAX_CHUNK_LOGITS // count))
        for begin in range(0, len(b), size):
            part = b[begin : begin + size]
            products = a @ part.T  # [B, size]
            z = scale * products + bias
            diagonal = first - begin  # column − row of the partners
            has_partners = -count < diagonal < len(part)
            loss += F.softplus(z).sum()
            grad = torch.sigmoid(z)
            if has_partners:
                loss -= z.diagonal(diagonal).sum()
                grad.diagonal(diagonal).sub_(1)
            grads[0] += scale * (grad @ part)
            grads[1][begin : begin + size] = scale * (grad.T @ a)
            grads[2] += (grad * products).sum()
            grads[3] += grad.sum()
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return tuple(grad * each for each in ctx.saved_tensors)
