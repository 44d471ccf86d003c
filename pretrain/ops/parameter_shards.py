"""Local shards and full tensors of parameters in every mode: replicated, sharded on dim 0 (FSDP2), or flattened and
then sharded (ZeRO-3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.ops.gather import all_gather


def local(parameter: Tensor) -> Tensor:
    """This rank's shard, as a view that can be changed in place."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """The full parameter. Collective: every rank must call it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: flattened and sharded evenly, the last shard padded
        piece = parameter.ds_tensor.detach()
        out = piece.new_empty(piece.numel() * dist.get_world_size())
        all_gather(out, piece.contiguous())
        return out[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
    return parameter.detach()


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """A module's full state dict in host memory, gathered tensor by tensor; an empty dict if `keep` is false.
    Collective: every rank must call it."""
    out = {}
    for name, value in module.state_dict(keep_vars=True).items():
        value = whole(value)
        if keep:
            out[name] = value.cpu().clone() if value.device.type == "cpu" else value.cpu()
    return out
