"""Tests the attention kernels before a run starts, with the heads, widths, groups of heads, windows and masks of its
model.

For each kind of attention in the model, the kernel and the plain module compute a small example, forward and backward,
and the results are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.layers import Attention, PackedAttention
from pretrain.models.t5 import DecoderStack, EncoderDecoderTransformer, RelativeBias
from pretrain.models.text_layers import MaskedAttention, Masks, SelfAttention, TextBackbone

SHAPES = [(2, 40), (1, 9)]  # shapes of the packed sequences
LENGTH = 160  # number of tokens in a row: more than the tokens of one block of FlexAttention
WINDOW = 50  # width of the window in examples that have one: shorter than a row, so that it has an effect


class Call(NamedTuple):
    """One kind of attention that a model uses: of rows of documents (`masked`), or of packed sequences of several
    sizes."""

    heads: int
    key_heads: int
    width: int
    masked: bool = False  # rows with documents
    causal: bool = False
    window: bool = False
    relative: bool = False  # T5's positions
    scale: float | None = None


def calls_of(objective: nn.Module) -> tuple[Call, ...]:
    """The kinds of attention in the models of an objective, each once."""
    found = {
        Call(module.heads, module.heads, module.qkv.in_features // module.heads)
        for module in objective.modules()
        if isinstance(module, Attention)
    }
    for stack in objective.modules():
        if not isinstance(stack, (TextBackbone, DecoderStack)):
            continue
        relative = isinstance(stack, (EncoderDecoderTransformer, DecoderStack))
        for block in stack.blocks:
            a = block.attn
            if isinstance(a, SelfAttention):
                sizes = a.heads, a.kv_heads, a.head_dim
                found.add(Call(*sizes, True, stack.causal, a.window > 0, relative, a.scale))
    return tuple(sorted(found, key=str))


def difference(table: Mapping[Any, Any], calls: tuple[Call, ...], device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative difference between the results of kernels and of the plain modules, over all outputs and
    gradients: the norm of the difference divided by the norm of the plain result. A result that is not finite
    counts as a very large difference. Rounding to bf16 alone makes it about 0.01, for any number of heads in a group.

    `table`: {class of the plain module: class of its kernel}.
    """
    return max((_of_call(table, call, device, dtype) for call in calls), default=0.0)


def _of_call(table: Mapping[Any, Any], call: Call, device: torch.device, dtype: torch.dtype) -> float:
    draw = torch.Generator(device).manual_seed(0)
    rows = (2, LENGTH) if call.masked else (sum(b * n for b, n in SHAPES),)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=kind)

    q, k, v, slope = (random(*rows, h, call.width) for h in (call.heads, call.key_heads, call.key_heads, call.heads))
    if call.scale is not None:  # as the model's queries are: scores have a variance of 1
        q = q / (call.scale * call.width**0.5)
    weight = random(32, call.heads, kind=torch.float32)  # of the relative positions
    results = []
    for kinds in ({}, table):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *([weight] if call.relative else []))]
        out = _attend(kinds, call, leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, slope)])
    plain, ours = results
    shares = [(one - other).float().norm() / other.float().norm() for one, other in zip(ours, plain, strict=True)]
    return float(torch.stack(shares).nan_to_num(nan=torch.inf).max())


def _attend(kinds: Mapping[Any, Any], call: Call, leaves: list[Tensor]) -> Tensor:
    q, k, v, *weight = leaves
    if not call.masked:
        return kinds.get(PackedAttention, PackedAttention)()(q, k, v, SHAPES)
    documents = torch.zeros(2, LENGTH, dtype=torch.int64, device=q.device)
    documents[0, 100:] = 1  # the other row is one document
    places = torch.arange(LENGTH, device=q.device)
    if call.relative:
        cfg = SimpleNamespace(buckets=32, heads=call.heads, max_distance=128)
        relative = kinds.get(RelativeBias, RelativeBias)(cfg, both_sides=not call.causal).to(q.device)
        del relative.weight
        relative.weight = weight[0]
        mask = relative(places, places, documents)
    else:
        window = WINDOW if call.window else 0
        (mask,) = kinds.get(Masks, Masks)()(places, places, [window], documents, call.causal)
    return kinds.get(MaskedAttention, MaskedAttention)()(q, k, v, mask, scale=call.scale)
