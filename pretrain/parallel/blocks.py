"""Activation recomputation and compilation of an objective's blocks, before an engine wraps or shards it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.errors import ConfigError
from pretrain.models.layers import Backbone, Block
from pretrain.objectives.base import Objective

BACKEND = "inductor"
GRAPHS_PER_NETWORK = 8  # upper bound of the number of graphs that torch.compile makes for one network
aten = torch.ops.aten
# Operations whose results selective recomputation keeps: matrix products and attention. All others are cheap.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._efficient_attention_forward.default,
}
KEPT_NAMES = {  # names of such operations that exist only after their library was imported: varlen, xformers, flex
    "torch_attn._varlen_attn.default",
    "xformers_flash.flash_fwd.default",
    "xformers_flash3.flash_fwd.default",
    "flex_attention",
}


def prepare(objective: Objective, recompute: Literal["none", "selective", "full"], compiled: bool) -> None:
    """Set up recomputation, then compilation; an engine shards afterwards (other orders do not work). Parameter names
    do not change."""
    if recompute == "none" and not compiled:
        return
    found = blocks_of(objective)
    if not found:
        raise ConfigError(
            "parallel.recompute, parallel.compile: this model has no blocks;"
            " write parallel.recompute=none and parallel.compile=false"
        )
    if compiled:
        _allow_graphs(objective)
    for block in found:
        trained = any(p.requires_grad for p in block.parameters())
        if recompute != "none" and trained:  # a teacher keeps no activations
            if any(isinstance(m, _BatchNorm) for m in block.modules()):
                raise ConfigError(
                    f"parallel.recompute = {recompute}: this model's batch norms would count every batch twice;"
                    " write parallel.recompute=none"
                )
            _recompute(block, recompute)
        if compiled:
            block.compile(backend=BACKEND, dynamic=True)


def blocks_of(objective: Objective) -> list[nn.Module]:
    """All transformer blocks of an objective, and the shard units of backbones without transformer blocks."""
    out: list[nn.Module] = [m for m in objective.modules() if isinstance(m, Block)]
    for body in objective.modules():
        if isinstance(body, Backbone):
            out += [unit for unit in body.shard_units() if unit is not body and not isinstance(unit, Block)]
    return out


def _allow_graphs(objective: Objective) -> None:
    """Raise torch's limit of graphs to the number that this objective needs; beyond it blocks would run uncompiled.

    All blocks share one limit, because they share their code. With `dynamic=True` one graph serves any number and size
    of crops. There are separate graphs for student, teacher and Gram teacher, for inputs of one size and of two sizes,
    and for training and evaluation.
    """
    networks = sum(isinstance(module, Backbone) for module in objective.modules())
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_NETWORK * networks)


class GraphLog:
    """Logs the steps in which torch.compile has made graphs. Graphs in late steps mean that blocks are compiled again,
    during which the training waits."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.seen = say, counters["stats"]["unique_graphs"]

    def __call__(self, step: int) -> None:
        made = counters["stats"]["unique_graphs"]
        if made > self.seen:
            limit = torch._dynamo.config.recompile_limit
            self.say(f"step {step}: torch.compile made {made - self.seen} graphs; {made} so far, the limit is {limit}")
            self.seen = made


def _recompute(block: nn.Module, how: str) -> None:
    inner = block.forward
    options: dict[str, Any] = {}
    if how == "selective":
        options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}

    # A function of this file, because torch.compile skips functions in files of torch.
    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(inner, *args, use_reentrant=False, **options, **kwargs)

    block.forward = forward  # type: ignore[method-assign]


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    kept = operation in KEPT or str(operation) in KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
