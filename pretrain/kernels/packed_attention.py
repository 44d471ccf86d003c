"""Attention of packed sequences in one call, by xformers (`memory_efficient_attention`) or by
`torch.nn.attention.varlen`: crops of several sizes, and documents with causal masks and windows.

Both kernels take the lengths of the sequences instead of a mask. The lengths of crops are known from their shapes, so
that their masks are built once for each batch shape. The lengths of documents are read from the device once in each
forward, which is a host sync; `flex_attention.py` needs none. Shapes: T tokens of all sequences, H heads of width d, K
key-value heads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.models.layers import PackedAttention, Shapes
from pretrain.models.text_layers import MaskedAttention, Masks

MAX_KEPT_MASKS = 64  # enough for student and teacher, with and without drop path, each with a few sizes


@dataclass(frozen=True, eq=False)
class Spans:
    """Rows of tokens as sequences: the lengths of the sequences, row by row (None: every row is one sequence), and the
    keys of its sequence that a query attends to. `window`: the number of these, including the query itself; 0: no
    limit."""

    lengths: tuple[int, ...] | None
    causal: bool
    window: int


class SeveralSizes(PackedAttention):
    """Base class for packed sequences. If all sequences have one size, they are a batch, for which the plain module
    needs no mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        if len({n for _, n in shapes}) > 1:
            return self._packed(q, k, v, shapes)
        return super().forward(q, k, v, [(sum(b for b, _ in shapes), shapes[0][1])])

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        raise NotImplementedError


class SpanMasks(Masks):
    def forward(
        self, queries: Tensor, keys: Tensor, windows: list[int], documents: Tensor | None, causal: bool
    ) -> list[Any]:
        plain_window = any(w and not causal for w in windows)  # both kernels have windows into the past only
        if len(queries) != len(keys) or plain_window:
            return super().forward(queries, keys, windows, documents, causal)
        lengths = None if documents is None else lengths_of(documents)
        some = documents is not None
        return [Spans(lengths, causal, w) if some or 0 < w < len(keys) else None for w in windows]


class SpanAttention(MaskedAttention):
    """Attention with the spans of `SpanMasks`; with another mask or no mask, as in the plain module."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        if not isinstance(mask, Spans):
            return super().forward(q, k, v, mask, causal, scale)
        return self._spans(q, k, v, mask, scale)

    def _spans(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None) -> Tensor:
        """q [B, T, H, d], k and v [B, T, K, d] → [B, T, H, d]."""
        raise NotImplementedError


def lengths_of(documents: Tensor) -> tuple[int, ...]:
    """The lengths of the documents in documents [B, T], row by row. Waits for the device."""
    rows = documents.cpu()
    first = torch.ones_like(rows, dtype=torch.bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    starts = first.flatten().nonzero().flatten()
    return tuple(torch.diff(starts, append=starts.new_tensor([rows.numel()])).tolist())


# ---------------------------------------------------------------- xformers
@functools.lru_cache(MAX_KEPT_MASKS)
def block_diagonal(lengths: tuple[int, ...], device: torch.device, causal: bool = False, window: int = 0) -> Any:
    """xformers' mask for consecutive sequences with these lengths."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    with torch.inference_mode(False):  # training may need it later
        mask = BlockDiagonalMask.from_seqlens(lengths, device=device)
    if window and window < max(lengths):
        return mask.make_local_attention(window)
    return mask.make_causal() if causal else mask


@torch.compiler.disable
def by_xformers(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None = None) -> Tensor:
    """q [T, H, d], k and v [T, K, d] → [T, H, d]."""
    from xformers.ops import memory_efficient_attention

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the backward does not support groups
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return memory_efficient_attention(*(x.unsqueeze(0) for x in (q, k, v)), attn_bias=mask, scale=scale).squeeze(0)


class XformersPackedAttention(SeveralSizes):
    @torch.compiler.disable
    def _packed(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        return by_xformers(q, k, v, block_diagonal(_repeated(shapes), q.device))


class XformersMaskedAttention(SpanAttention):
    @torch.compiler.disable  # else it would compile again for each batch's lengths
    def _spans(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None) -> Tensor:
        b, t = q.shape[:2]
        mask = block_diagonal(spans.lengths or (t,) * b, q.device, spans.causal, spans.window)
        return by_xformers(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, scale).unflatten(0, (b, t))


# ---------------------------------------------------------------- torch.nn.attention.varlen
@functools.lru_cache(MAX_KEPT_MASKS)
def borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [sequences + 1]: the beginning of each sequence, and the end of the last one."""
    with torch.inference_mode(False):
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def window_of(causal: bool, window: int) -> tuple[int, int]:
    """The argument `window_size` of varlen_attn: the numbers of earlier and later tokens that a query attends to; −1
    for all."""
    return (window - 1 if window else -1, 0 if causal else -1)


@torch.compiler.disable
def by_varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: tuple[int, int], scale: Any) -> Tensor:
    """q [T, H, d], k and v [T, K, d] → [T, H, d]. In half precision only."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = borders(lengths, q.device), max(lengths)
    grouped = q.shape[1] != k.shape[1]
    return varlen_attn(  # type: ignore[return-value]
        q, k, v, starts, starts, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
    )


class VarlenPackedAttention(SeveralSizes):
    @torch.compiler.disable  # else it would compile again for each number of sequences
    def _packed(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        return by_varlen(q, k, v, _repeated(shapes), (-1, -1), None)


class VarlenMaskedAttention(SpanAttention):
    @torch.compiler.disable
    def _spans(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float | None) -> Tensor:
        b, t = q.shape[:2]
        window = window_of(spans.causal, spans.window)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return by_varlen(*flat, spans.lengths or (t,) * b, window, scale).unflatten(0, (b, t))


def _repeated(shapes: Shapes) -> tuple[int, ...]:
    """The length of each of the packed sequences."""
    return tuple(n for b, n in shapes for _ in range(b))
