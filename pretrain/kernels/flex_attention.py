"""Attention of documents, windows and crops by FlexAttention (arXiv 2412.05496): blocks of 128 × 128 scores that nobody
sees are not computed, and the mask inside of a block is computed from the documents' numbers.

Nothing here waits for the device, and no mask of T × T is built. Shapes: B rows of T tokens, n = ⌈T / 128⌉ blocks.
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
# more graphs than by default: one for each window, in training and in evaluation; beyond the limit, all T × T scores
# would be computed
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
attention: Any = torch.compile(eager_attention)


def block_mask(documents: Tensor, causal: bool, window: int) -> BlockMask:
    """Where documents [B, T] are the same, and, for causal masks, keys at most `window` − 1 tokens back (0: any).
    Documents of one row, [1, T], are those of every row of a batch.

    The numbers of a row need no order. A block is full, so that its scores are not masked one by one, where both its
    queries and its keys are of one document and all of them in reach; it is left out where the ranges of their numbers
    do not overlap or none is in reach.
    """
    length = documents.shape[1]
    numbers = torch.where(documents < 0, 1 << 30, documents)  # padding comes last, so that ranges of numbers stay short
    rest = numbers[:, -1:].expand(-1, -length % BLOCK)
    blocks = torch.cat([numbers, rest], dim=1).unflatten(1, (-1, BLOCK))  # [B, n, 128]
    low, high = blocks.amin(2), blocks.amax(2)  # [B, n]
    near = (low.unsqueeze(2) <= high.unsqueeze(1)) & (low.unsqueeze(1) <= high.unsqueeze(2))  # [B, n queries, n keys]
    whole = torch.arange(low.shape[1], device=low.device) < length // BLOCK  # the last block may reach beyond the row
    alone = (low == high) & whole
    full = near & alone.unsqueeze(2) & alone.unsqueeze(1)
    place = torch.arange(low.shape[1], device=documents.device)
    apart = place.unsqueeze(1) - place  # in blocks
    if causal:
        near, full = near & (apart >= 0), full & (apart > 0)
    if window:
        near, full = near & ((apart - 1) * BLOCK + 1 < window), full & ((apart + 1) * BLOCK - 1 < window)

    shared = len(documents) == 1

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = b * 0 if shared else b  # b counts the rows of the batch, of which documents may have fewer
        same = documents[row, query] == documents[row, key]
        same = same & (query >= key) if causal else same
        return same & (query - key < window) if window else same

    return BlockMask.from_kv_blocks(
        *_listed(near & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, n, n] → (how many key blocks each query block has, [B, 1, n]; all key blocks, these first,
    [B, 1, n, n]), int32."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


@torch.compiler.disable  # else a compiled block would build the mask anew in each call
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
