"""Cross-entropy from hidden states and a head's weights without materialising all logits: for language models and
prototype heads.

Shapes: N rows, D features, V classes (tokens of a vocabulary, or prototypes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.precision import wide

IGNORED = -100  # a row with this target does not count
CHUNKS_PER_BYTE = 2  # chunks per byte of a logit; many chunks cost time, since each adds to the full weight gradient
MAX_CHUNK_LOGITS = 1 << 27  # largest number of logits in a chunk


def classification(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean cross-entropy, {"accuracy": share of the rows whose highest logit is that of the target}) of logits [N, V],
    in fp32 or wider, and targets int64 [N]."""
    return F.cross_entropy(logits, targets), {"accuracy": (logits.argmax(1) == targets).float().mean()}


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
    """Σ over rows of row_weights · (−log softmax(logits)_target + z_loss · logsumexp(logits)²), a scalar in fp32 or
    wider.

    hidden       [N, D]
    weight       [V, D]; bias [V] or None
    targets      long [N], −100 for rows that do not count; or soft targets [N / n, V], float, rows sum to 1:
                 target row i serves the n consecutive hidden rows i·n … i·n + n − 1
    row_weights  [N] or None
    softcap      logits ← softcap · tanh(logits / softcap), after scale · hidden weightᵀ + bias (arXiv 2408.00118)
    z_loss       arXiv 2204.02311

    No gradient flows to targets and row_weights. The forward processes rows in chunks and computes their gradients at
    once, so that only the logits of one chunk exist at a time. Matrix products use the dtype of autocast, all other
    operations fp32 or wider.
    """
    return _Chunked.apply(hidden, weight, bias, targets, row_weights, _Options(softcap, z_loss, scale, chunks))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None, o):
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        dtype = hidden.dtype if hidden.dtype == torch.float64 else dtype
        with torch.autocast(kind, enabled=False):
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            h, w = hidden.to(dtype), weight.to(dtype)
            needed = ctx.needs_input_grad[:3]
            grads = [
                torch.empty_like(hidden, dtype=exact if dtype == torch.float16 else None) if needed[0] else None,
                torch.zeros(weight.shape, dtype=exact, device=weight.device) if needed[1] else None,
                torch.zeros(len(weight), dtype=exact, device=weight.device) if needed[2] else None,
            ]
            loss = torch.zeros((), dtype=exact, device=hidden.device)
            valid = (targets != IGNORED).to(exact) if targets.ndim == 1 else None
            rows = valid if rows is None else rows.to(exact) if valid is None else rows.to(exact) * valid
            chunks = o.chunks or max(CHUNKS_PER_BYTE * h.element_size(), -(-len(h) * len(w) // MAX_CHUNK_LOGITS))
            for part in _parts(len(h), -(-len(h) // chunks)):
                own = None if rows is None else rows[part]
                value, gradient = _rows(h[part] @ w.t(), _of(targets, part, len(h)), bias, own, o)
                loss += value
                if any(needed):
                    _add_gradients(grads, part, h, w, gradient())
            if grads[2] is not None:
                grads[2] /= o.scale  # `scale` multiplies the products, but not the bias
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return *(None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.saved_tensors), None, None, None


def _parts(count: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, count)) for i in range(0, count, max(1, size))]


def _of(targets: Tensor, part: slice, count: int) -> Tensor:
    """The targets of the rows `part` of `count` rows."""
    if len(targets) == count:
        return targets[part]
    return targets[torch.arange(part.start, part.stop, device=targets.device) // (count // len(targets))]


def _add_gradients(grads: list[Tensor | None], part: slice, h: Tensor, w: Tensor, logit_grad: Tensor) -> None:
    """Add a chunk's gradients of hidden states, weights and bias, from the gradient of its logits [n, V]."""
    hidden_grad, weight_grad, bias_grad = grads
    if bias_grad is not None:
        bias_grad += logit_grad.sum(0, dtype=bias_grad.dtype)
    # The loss scale of fp16 is applied in the backward only, and small numbers underflow in fp16: divide by the
    # largest.
    unit = logit_grad.abs().amax().clamp_min(1e-30) if h.dtype == torch.float16 else None
    logit_grad = (logit_grad if unit is None else logit_grad / unit).to(h.dtype)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b if unit is None else (a @ b).float() * unit

    if hidden_grad is not None:
        hidden_grad[part] = product(logit_grad, w)
    if weight_grad is not None:
        weight_grad += product(logit_grad.t(), h[part])


def _rows(z: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None, o: _Options):
    """(loss, function that returns its gradient) of the matrix products z [n, V]; the gradient has the shape of z."""
    z = wide(z)
    if o.scale != 1:
        z = z * o.scale
    if bias is not None:
        z = z + bias.to(z.dtype)
    tanh = None
    if o.softcap is not None:
        tanh = torch.tanh(z / o.softcap)
        z = tanh * o.softcap
    p = z.softmax(-1)
    # The logsumexp follows from the largest probability, which is at least 1/V; this saves a second pass of
    # exponentials.
    lse = z.amax(-1) - p.amax(-1).log()
    hard = targets.ndim == 1
    index = targets.clamp_min(0).unsqueeze(1) if hard else None  # [n, 1]
    target_logits = z.gather(1, index).squeeze(1) if hard else (targets * z).sum(-1)  # [n]
    losses = lse - target_logits
    if o.z_loss:
        losses = losses + o.z_loss * lse.square()

    def gradient() -> Tensor:
        nonlocal p
        if o.z_loss:
            p.mul_((1 + 2 * o.z_loss * lse).unsqueeze(1))
        p = p.scatter_add_(1, index, p.new_full(index.shape, -1.0)) if hard else p.sub_(targets)
        if rows is not None:
            p.mul_(rows.unsqueeze(1))
        if tanh is not None:
            p.mul_(1 - tanh.square())
        return p.mul_(o.scale) if o.scale != 1 else p

    return (losses if rows is None else losses * rows).sum(), gradient
