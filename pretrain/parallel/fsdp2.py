"""FSDP2 and HSDP: every parameter is sharded over ranks on dim 0, and gathered unit by unit when it is used (arXiv
2304.11277).

With `parallel.replicate` > 1 the ranks form that many groups: parameters are sharded within a group and replicated over
groups (HSDP).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.objectives.base import Batch
from pretrain.ops.parameter_shards import local
from pretrain.parallel import processes
from pretrain.parallel.engine import COMPUTE, Engine
from pretrain.recipes.recipe import Recipe


def starts_empty(recipe: Recipe) -> bool:
    """Whether this rank may build the objective on the meta device, because rank 0 will broadcast the weights.

    Host memory then holds all weights once per run instead of once per process. While `precision` is auto, every rank
    needs weights to measure it (on CPUs only, see `device.precision_of`).
    """
    return processes.rank() > 0 and _broadcasts_weights(recipe)


def _broadcasts_weights(recipe: Recipe) -> bool:
    return recipe.parallel.mode in ("fsdp2", "zero3") and processes.world() > 1 and recipe.precision != "auto"


def stay_gathered(units: list[nn.Module]) -> list[nn.Module]:
    """The units that are not resharded between forward and backward: those that contain other units and also have
    trained parameters outside of these.

    Their forward ends after that of the units inside them, and their backward begins before it, so that they would be
    gathered again at once. Units of a teacher are resharded after the forward, because they have no backward that would
    reshard them. `units`: children before parents.
    """
    seen: set[nn.Parameter] = set()
    inner: set[nn.Module] = set()
    out = []
    for unit in units:
        own = [p for p in unit.parameters() if p not in seen]
        if any(p.requires_grad for p in own) and any(child in inner for child in unit.modules()):
            out.append(unit)
        seen.update(own)
        inner.add(unit)
    return out


class FSDP2(Engine):
    """`parallel.mode: fsdp2`."""

    def wrap(self) -> FSDPModule:
        parallel, kind = self.recipe.parallel, self.device.type
        shape: tuple[int, ...] = (self.world,)
        names: tuple[str, ...] = ("shard",)
        if parallel.replicate > 1:
            shape, names = (parallel.replicate, self.world // parallel.replicate), ("replicate", "shard")
        mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=names)
        # Autocast is used as in the other modes; in addition, weights are gathered in the compute dtype.
        compute = COMPUTE[self.precision]
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Frozen units have no reduce_dtype: with it, PyTorch expects gradients of units that the forward has not
        # called.
        frozen_policy = MixedPrecisionPolicy(param_dtype=compute, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if parallel.offload else OffloadPolicy()
        broadcast = _broadcasts_weights(self.recipe)
        given = {name: t.detach() for name, t in self._tensors()} if broadcast and self.rank == 0 else {}
        units = self.objective.shard_units()
        frozen: list[nn.Module] = []
        replicated = set()
        if parallel.frozen == "replicated":
            frozen = [u for u in units[:-1] if not any(p.requires_grad for p in u.parameters())]
            units = [u for u in units if u not in frozen]
            replicated = {p for u in frozen for p in u.parameters()}
        # Our code does not change such a view in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        kept = stay_gathered(units)
        for unit in units:
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy if any(p.requires_grad for p in unit.parameters()) else frozen_policy,
                offload_policy=offload,
                reshard_after_forward=unit not in kept,
                ignored_params=replicated,
            )
        if any(p.is_meta for p in self.objective.parameters()):
            self.objective.to_empty(device="cpu" if parallel.offload else self.device)
        # by module, because parameters that were on the meta device are other objects now
        moved: dict[nn.Parameter, nn.Parameter] = {}
        for part in {part for unit in frozen for part in unit.modules()}:
            for name, parameter in part.named_parameters(recurse=False):
                moved.setdefault(parameter, nn.Parameter(parameter.to(self.device), requires_grad=False))
                setattr(part, name, moved[parameter])
        for module in self.objective.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        if broadcast:
            self._broadcast(given)
        register_fsdp_forward_method(self.objective, "pictures")
        self.kept = kept
        return self.objective  # type: ignore[return-value]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The objective's parameters and buffers by name."""
        return itertools.chain(self.objective.named_parameters(), self.objective.named_buffers())

    @torch.no_grad()
    def _broadcast(self, given: dict[str, Tensor]) -> None:
        """Fill the parameters and buffers of all ranks with those of rank 0. `given`: on rank 0, the full tensors by
        name.

        Tensors are broadcast one at a time, so that only rank 0 holds all of them. torch's
        `set_model_state_dict(broadcast_from_rank0)` refuses offloading, where shards are in host memory and buffers on
        the device.
        """
        for name, target in self._tensors():
            if self.rank == 0:
                full = given[name].to(self.device)
            else:
                full = torch.empty(target.shape, dtype=target.dtype, device=self.device)
            dist.broadcast(full, src=0)
            if isinstance(target, DTensor):
                full = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None).to_local()
            local(target).copy_(full)

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        return contextlib.nullcontext()

    def validate(self, batches: Iterable[Batch], step: int) -> Tensor:
        loss = super().validate(batches, step)
        self._reshard()
        return loss

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        pictures = super().pictures(batch)
        self._reshard()
        return pictures

    def _reshard(self) -> None:
        """After a forward without a backward, reshard the units that stay gathered until a backward."""
        for unit in self.kept:
            unit.reshard()  # type: ignore[operator]
