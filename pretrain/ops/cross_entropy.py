"""The cross-entropy of hidden states and a head's weights, without ever holding all logits: of language models, and of heads of prototypes.

Shapes: N rows, D features, V classes (tokens of a vocabulary, or prototypes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.ops.products import on_cpu, product, through_fp32

IGNORED = -100  # a target that counts for nothing
CHUNKS = 2  # for each byte of a logit; more of them cost time: each adds to the whole gradient of the weights
LARGEST = 1 << 27  # logits of a chunk
CLASSES = 2048  # whose weights' gradients a CPU computes at a time
CACHED = 1 << 19  # logits that are worked on at a time on a CPU: 2 MB


class _Options(NamedTuple):
    softcap: float | None
    z_loss: float
    scale: float
    chunks: int | None


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    scale: float = 1.0,
    chunks: int | None = None,
) -> Tensor:
    """Σ over rows of row_weights · (−log softmax(logits)_target + z_loss · logsumexp(logits)²), a scalar in fp32 or wider.

    hidden [N, D], weight [V, D], targets long [N] (-100: the row counts for nothing) or float [N / n, V] whose rows sum to 1, each the target of n rows
    on end; no gradient goes to these, nor to row_weights [N]. logits = scale · hidden weightᵀ + bias, then softcap · tanh(logits / softcap) (arXiv 2408.00118); z_loss as in arXiv 2204.02311.
    Rows are taken in chunks, and their gradients are computed at once, so that logits of one chunk is all that there is at any time. Products are in
    the precision of autocast, all else in fp32 or wider.
    """
    return _Chunked.apply(hidden, weight, bias, targets, row_weights, _Options(softcap, z_loss, scale, chunks))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, o):
        kind, wide = hidden.device.type, through_fp32(hidden)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        dtype = hidden.dtype if hidden.dtype == torch.float64 else dtype
        with torch.autocast(kind, enabled=False):
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            # by the fp32 kernel, weights as they are: a rounded copy would cost memory for less exactness
            h, w = (hidden.float(), weight.float()) if wide else (hidden.to(dtype), weight.to(dtype))
            needed = ctx.needs_input_grad[:3]
            grads = [
                torch.empty_like(hidden) if needed[0] else None,
                torch.zeros(weight.shape, dtype=exact, device=weight.device) if needed[1] else None,
                torch.zeros(len(weight), dtype=exact, device=weight.device) if needed[2] else None,
            ]
            loss = torch.zeros((), dtype=exact, device=hidden.device)
            valid = (targets != IGNORED).to(exact) if targets.ndim == 1 else None
            rows = valid if rows is None else rows.to(exact) if valid is None else rows.to(exact) * valid
            chunks = o.chunks or max(CHUNKS * h.element_size(), -(-len(h) * len(w) // LARGEST))
            for part in _parts(len(h), -(-len(h) // chunks)):
                logits = product(h[part], w.t())
                own = None if rows is None else rows[part]
                loss += _in_blocks(logits, _of(targets, part, len(h)), bias, own, o, any(needed))
                _add_gradients(grads, part, h, w, logits)
            if grads[2] is not None:
                grads[2] /= o.scale  # which the products were multiplied by, the bias was not
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return *(None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors), None, None, None


def _parts(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, max(1, size))]


def _of(targets: Tensor, part: slice, count: int) -> Tensor:
    """The targets of a part of `count` rows."""
    if len(targets) == count:
        return targets[part]
    return targets[torch.arange(part.start, part.stop, device=targets.device) // (count // len(targets))]


def _add_gradients(grads: list[Tensor | None], part: slice, h: Tensor, w: Tensor, slopes: Tensor) -> None:
    """What a chunk's gradients by its logits [n, V] are by hidden states, weights and bias."""
    by_hidden, by_weight, by_bias = grads
    if by_hidden is not None:
        by_hidden[part] = product(slopes, w)
    if by_weight is not None:
        for some in _parts(len(w), CLASSES if on_cpu(w) else len(w)):  # so that no product is as large as all weights
            by_weight[some] += product(slopes[:, some].t(), h[part])
    if by_bias is not None:
        by_bias += slopes.sum(0, dtype=by_bias.dtype)


def _in_blocks(
    logits: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None, o: _Options, slopes: bool
) -> Tensor | float:
    """The loss of a chunk; where `slopes`, its gradients by hidden · weightᵀ are written over these products [n, V]. On a CPU, as many rows at a time
    as stay in its cache."""
    size = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    total: Tensor | float = 0.0
    for part in _parts(len(logits), size):
        own = None if rows is None else rows[part]
        loss, gradient = _rows(logits[part], targets[part], bias, own, o)
        total = total + loss
        if slopes:
            logits[part] = gradient()
    return total


def _rows(z: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None, o: _Options):
    """(loss of rows of products z [n, V], what gives their gradient by z)."""
    z = z if z.dtype == torch.float64 else z.float()
    if o.scale != 1:
        z = z * o.scale
    if bias is not None:
        z = z + bias.to(z.dtype)
    bent = None
    if o.softcap is not None:
        bent = torch.tanh(z / o.softcap)
        z = bent * o.softcap
    p = z.softmax(-1)
    # the largest logit's probability is never tiny, so this is logsumexp without another pass of exponentials
    lse = z.amax(-1) - p.amax(-1).log()
    hard = targets.ndim == 1
    place = targets.clamp_min(0).unsqueeze(1) if hard else None
    chosen = z.gather(1, place).squeeze(1) if hard else (targets * z).sum(-1)
    losses = lse - chosen
    if o.z_loss:
        losses = losses + o.z_loss * lse.square()

    def gradient() -> Tensor:
        nonlocal p
        if o.z_loss:
            p.mul_((1 + 2 * o.z_loss * lse).unsqueeze(1))
        p = p.scatter_add_(1, place, p.new_full(place.shape, -1.0)) if hard else p.sub_(targets)
        if rows is not None:
            p.mul_(rows.unsqueeze(1))
        if bent is not None:
            p.mul_(1 - bent.square())
        return p.mul_(o.scale) if o.scale != 1 else p

    return (losses if rows is None else losses * rows).sum(), gradient
