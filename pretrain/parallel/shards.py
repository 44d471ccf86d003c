"""What a process holds of a parameter, whichever engine has spread it: all of it, its rows (FSDP2), or a flat piece (ZeRO-3)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.ops.gather import all_gather


def local(parameter: Tensor) -> Tensor:
    """The part that this process holds, as a view that can be changed in place."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All of it, gathered; with several processes all of them call it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: flat, cut into equal pieces, the last one padded
        piece = parameter.ds_tensor.detach()
        out = piece.new_empty(piece.numel() * dist.get_world_size())
        all_gather(out, piece.contiguous())
        return out[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
    return parameter.detach()


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """A module's state dict, gathered to main memory tensor by tensor; empty where `keep` is false, though all processes must call it."""
    out = {}
    for name, value in module.state_dict(keep_vars=True).items():
        value = whole(value)
        if keep:
            out[name] = value.cpu().clone() if value.device.type == "cpu" else value.cpu()
    return out
