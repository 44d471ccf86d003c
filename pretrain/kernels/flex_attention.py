"""Attention of documents, windows and crops by FlexAttention (arXiv 2412.05496). Blocks of 128 × 128 scores that are
masked completely are not computed, and the mask inside a block is computed from the numbers of the documents.

There is no host sync, and no mask of T × T is built. Shapes: B rows of T tokens, n = ⌈T / 128⌉ blocks.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as eager_attention

from pretrain.kernels.packed_attention import MAX_KEPT_MASKS, SeveralSizes
from pretrain.models.layers import Shapes
from pretrain.models.t5 import RelativeBias
from pretrain.models.text_layers import MaskedAttention, Masks

BLOCK = 128
# More graphs than torch's default limit, because each window has one in training and one in evaluation. Beyond the
# limit all T × T scores would be computed.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
attention: Any = torch.compile(eager_attention)


def block_mask(documents: Tensor, causal: bool, window: int) -> BlockMask:
    """The mask in which a query attends to the keys of its document; with `causal`, only to itself and earlier keys;
    with `window`, only to keys fewer than `window` tokens before it. documents: [B, T], or [1, T] for equal rows of a
    batch.

    The numbers of the documents in a row need no order. A block of scores is full, so that its scores are not masked
    one by one, if all its queries and keys are in one document and all pairs are allowed by `causal` and `window`. It
    is omitted if the ranges of document numbers of its queries and keys do not overlap, or if no pair is allowed.
    """
    length = documents.shape[1]
    numbers = torch.where(documents < 0, 1 << 30, documents)  # padding comes last, so that ranges of numbers stay short
    rest = numbers[:, -1:].expand(-1, -length % BLOCK)
    blocks = torch.cat([numbers, rest], dim=1).unflatten(1, (-1, BLOCK))  # [B, n, 128]
    low, high = blocks.amin(2), blocks.amax(2)  # [B, n]
    partial = (low.unsqueeze(2) <= high.unsqueeze(1)) & (
        low.unsqueeze(1) <= high.unsqueeze(2)
    )  # [B, n queries, n keys]
    block = torch.arange(low.shape[1], device=documents.device)
    is_inside_row = block < length // BLOCK  # the last block may extend beyond the row
    is_one_document = (low == high) & is_inside_row
    full = partial & is_one_document.unsqueeze(2) & is_one_document.unsqueeze(1)
    distance = block.unsqueeze(1) - block  # of query block and key block, in blocks
    if causal:
        partial, full = partial & (distance >= 0), full & (distance > 0)
    if window:
        partial = partial & ((distance - 1) * BLOCK + 1 < window)  # the nearest pair is allowed
        full = full & ((distance + 1) * BLOCK - 1 < window)  # the most distant pair is allowed

    rows_are_equal = len(documents) == 1

    def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = b * 0 if rows_are_equal else b
        visible = documents[row, query] == documents[row, key]
        visible = visible & (query >= key) if causal else visible
        return visible & (query - key < window) if window else visible

    return BlockMask.from_kv_blocks(
        *_listed(partial & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """From the chosen key blocks of each query block, bool [B, n, n]: (their number [B, 1, n]; the indices of all key
    blocks, the chosen ones first, [B, 1, n, n]), int32."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


@torch.compiler.disable  # otherwise a compiled block would build the mask again in each call
@functools.lru_cache(MAX_KEPT_MASKS)
def packed_mask(shapes: tuple[tuple[int, int], ...], device: torch.device) -> BlockMask:
    """The mask of packed sequences, as one row."""
    ends = itertools.accumulate(b for b, _ in shapes)
    with torch.inference_mode(False):  # training may need it later
        numbers = [
            torch.arange(end - b, end, device=device).unsqueeze(1).expand(b, n).flatten()
            for end, (b, n) in zip(ends, shapes, strict=True)
        ]
        return block_mask(torch.cat(numbers).unsqueeze(0), False, 0)


class FlexPackedAttention(SeveralSizes):
    def _packed(self, q: Tensor, k: Tensor, v: Tensor, shapes: Shapes) -> Tensor:
        each = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, T, d]
        return attention(*each, block_mask=packed_mask(tuple(shapes), q.device)).squeeze(0).transpose(0, 1)


class BlockMasks(Masks):
    def forward(
        self, queries: Tensor, keys: Tensor, windows: list[int], documents: Tensor | None, causal: bool
    ) -> list[Any]:
        if len(queries) != len(keys):  # a cache: few queries
            return super().forward(queries, keys, windows, documents, causal)
        some = documents is not None
        numbers = torch.zeros_like(keys).unsqueeze(0) if documents is None else documents
        return [block_mask(numbers, causal, w) if some or 0 < w < len(keys) else None for w in windows]


class Biased(NamedTuple):
    """A mask, and the numbers that are added to the scores, for each head and each distance between key and query."""

    mask: BlockMask
    table: Tensor  # [H, 2T − 1], the distances −(T − 1) … T − 1


class FlexRelativeBias(RelativeBias):
    """Returns a number for each distance, instead of one for each pair of tokens."""

    def forward(self, queries: Tensor, keys: Tensor, documents: Tensor | None = None) -> Any:
        if len(queries) != len(keys):  # a cache: few queries
            return super().forward(queries, keys, documents)
        numbers = torch.zeros_like(keys).unsqueeze(0) if documents is None else documents
        distances = torch.arange(1 - len(keys), len(keys), device=keys.device)
        table = self.weight[self.buckets(distances)].t().contiguous()
        return Biased(block_mask(numbers, not self.both_sides, 0), table)


class FlexMaskedAttention(MaskedAttention):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, causal: bool = False, scale: float | None = None
    ) -> Tensor:
        if not isinstance(mask, (BlockMask, Biased)):
            return super().forward(q, k, v, mask, causal, scale)
        grouped = q.shape[2] != k.shape[2]
        each = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or K, T, d]
        change = None
        if isinstance(mask, Biased):
            (mask, table), last = mask, k.shape[1] - 1

            def change(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return score + table[h, key - query + last]

        return attention(*each, score_mod=change, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)
