"""What happens to an objective's transformer blocks before it is spread: activations recomputed in backward, and compilation."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.config import ConfigError
from pretrain.models import fused
from pretrain.models.layers import Backbone, Block
from pretrain.objectives.base import Objective
from pretrain.ops.products import onednn

aten = torch.ops.aten
# what selective recomputation keeps: the results of matrix products and of attention; the cheap rest is computed again
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
if onednn is not None:
    KEPT.add(onednn.default)


def prepare(objective: Objective, recompute: Literal["none", "selective", "full"], compiled: bool) -> None:
    """Set both up, in the order that works: recomputation, compilation, and then an engine's shards. Parameter names stay."""
    if recompute == "none" and not compiled:
        return
    found = blocks_of(objective)
    if not found:
        raise ConfigError("parallel.recompute, parallel.compile: this model has no blocks; take them out")
    for block in found:
        trained = any(p.requires_grad for p in block.parameters())
        if recompute != "none" and trained:  # a teacher keeps no activations
            if any(isinstance(m, _BatchNorm) for m in block.modules()):
                raise ConfigError(
                    f"parallel.recompute = {recompute}: this model's batch norms would count every batch twice; write parallel.recompute=none"
                )
            _recompute(block, recompute)
        if compiled:
            block.compile()


def blocks_of(objective: Objective) -> list[nn.Module]:
    """Transformer blocks wherever they are, and the blocks of other backbones."""
    out: list[nn.Module] = [m for m in objective.modules() if isinstance(m, Block)]
    for body in objective.modules():
        if isinstance(body, Backbone):
            out += [unit for unit in body.shard_units() if unit is not body and not isinstance(unit, Block)]
    return out


def _recompute(block: nn.Module, how: str) -> None:
    inner = block.forward
    options: dict[str, Any] = {}
    if how == "selective":
        inner = fused.switched_off()(inner)
        options = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}

    def forward(*args: Any, **kwargs: Any) -> Any:  # a function of ours: torch.compile passes over torch's own
        return checkpoint(inner, *args, use_reentrant=False, **options, **kwargs)

    block.forward = forward  # type: ignore[method-assign]


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
