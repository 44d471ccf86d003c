"""Engine: how an objective runs on its processes and devices: precision, accumulation, gradients, the optimizer's step, and its state.

The loop and the objectives know nothing of it; a new way to spread a run is a class with these methods. `build` makes the one that
`parallel.mode` names: here one process, copies on all (DDP), and pieces on all (FSDP2, HSDP); `deepspeed.py` has ZeRO.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.config import ConfigError
from pretrain.objectives.base import Batch, Objective
from pretrain.optim import make_optimizer
from pretrain.parallel import blocks, processes, rules
from pretrain.parallel.scale import LossScale
from pretrain.parallel.shards import local, whole_state
from pretrain.recipe import Recipe

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Judge = Callable[[Tensor], Tensor]


def accumulation(recipe: Recipe, couples_batch: bool, world: int = 1) -> int:
    """Micro-batches per step, from the global batch and the largest micro-batch that fits a process."""
    batch, micro = recipe.data.batch, recipe.parallel.micro_batch
    if micro is None:
        return 1
    if micro < 1 or batch % (world * micro):
        raise ConfigError(
            f"parallel.micro_batch = {micro}: data.batch = {batch} over {world} processes does not divide into it"
        )
    count = batch // (world * micro)
    if count > 1 and couples_batch and not recipe.parallel.accumulate_coupled:
        raise ConfigError(
            f"parallel.micro_batch = {micro}: the loss of {recipe.objective.name} couples the samples of a batch, so {count} micro-batches are not"
            f" one batch of {batch}; leave micro_batch out, or write parallel.accumulate_coupled=true if that is what you want"
        )
    return count


def build(objective: Objective, recipe: Recipe, device: torch.device) -> Engine:
    """The engine of `parallel.mode`. The objective has the weights that its seed gives, the same on every process and in every mode."""
    rules.check(recipe, processes.world())
    mode = recipe.parallel.mode
    if mode.startswith("zero"):
        from pretrain.parallel.deepspeed import Zero  # not installed everywhere

        return Zero(objective, recipe, device)
    return {"single": Engine, "ddp": DDP, "fsdp2": FSDP2}[mode](objective, recipe, device)


def starts_empty(recipe: Recipe) -> bool:
    """Whether this process may build the objective without weights: where each gets its piece of them from process 0, a machine's main memory does
    not have to hold all weights once for each of its devices. An `auto` precision on CPU is measured with weights."""
    return processes.rank() > 0 and _from_first(recipe)


def _from_first(recipe: Recipe) -> bool:
    measures = recipe.precision == "auto" and not torch.cuda.is_available()
    return recipe.parallel.mode == "fsdp2" and processes.world() > 1 and not measures


class Engine:
    """One process, one device (`parallel.mode: single`)."""

    def __init__(self, objective: Objective, recipe: Recipe, device: torch.device):
        self.device, self.recipe = device, recipe
        self.rank, self.world = processes.rank(), processes.world()
        self.accumulate = accumulation(recipe, objective.couples_batch, self.world)
        self.precision, self.clip, self.micro = recipe.precision, recipe.optim.clip, 0
        self.scale = LossScale(device, self.precision == "fp16")
        self.objective = objective
        blocks.prepare(objective, recipe.parallel.recompute, recipe.parallel.compile)
        self.module = self.spread()  # what is called in the objective's place
        self.optimizer = make_optimizer(objective, recipe.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def spread(self) -> Any:
        return self.objective.to(self.device)

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one micro-batch; gradients cross processes on the last only."""
        return contextlib.nullcontext()

    def seed(self, step: int) -> None:
        """Dropout and drop path are drawn anew for each step, micro-batch and process, and a resumed run draws the same."""
        words = np.random.SeedSequence([self.recipe.seed, step, self.micro, self.rank]).generate_state(2)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        self.micro += 1

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss and logs, in the compute precision."""
        self.seed(step)
        with self.autocast():
            return self.module(batch, step)

    def micro_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """A step's micro-batches. Where the loss is a mean over targets whose number varies, all are fetched first, and each gets `count`: the mean of
        these numbers over micro-batches and processes, so that the mean of the losses is the mean over the targets of the global batch."""
        if self.objective.counted is None:
            yield from batches
            return
        held = list(batches)
        count = processes.mean(torch.stack([self.objective.count(batch) for batch in held]).float().mean())
        for batch in held:
            yield batch | {"count": count.clamp_min(1e-9)}

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, COMPUTE[self.precision], enabled=self.precision != "fp32")

    def backward(self, loss: Tensor) -> None:
        self.scale.up(loss / self.accumulate).backward()

    def step(self, lr: float, weight_decay: float, judge: Judge | None = None) -> Tensor:
        """Clip, update, zero the gradients; the global gradient norm before clipping, still on the device.

        `judge` gets the norm, and where its answer (a scalar on the device) is 1.0, weights and optimizer state stay as they are.
        """
        self.set_rates(lr, weight_decay)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        pieces = [local(g) for g in gradients]
        self.scale.down(pieces)
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        norm = norm.to(self.device)  # of offloaded gradients it is not there
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = judge(norm) if judge else None  # type: ignore[attr-defined]  # fused optimizers look for it
        self.scale.adapt(norm)
        if self.clip is not None:
            factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(pieces, factor.to(pieces[0].device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.micro = 0
        return norm

    def set_rates(self, lr: float, weight_decay: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["wd_scale"]

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's pictures of a batch; all processes call it."""
        with self.autocast():
            return self.objective.pictures(batch)

    def encoder_states(self) -> dict[str, dict[str, Tensor]]:
        """The whole weights of each encoder that is exported, in main memory on process 0, nothing on others; all processes call it."""
        return {name: whole_state(body, self.rank == 0) for name, body in self.objective.encoders().items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name, ready for DCP: the same keys in every mode."""
        model, optimizer = get_state_dict(self.objective, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scale": self.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.objective, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scale.load_state_dict(state["scale"])


class DDP(Engine):
    """Every process has all weights, and gradients are averaged while the backward goes on."""

    def spread(self) -> DistributedDataParallel:
        ids = [self.device.index] if self.device.type == "cuda" else None
        # buffers need no broadcast: batch norm's are computed from all processes' samples
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.14
        return DistributedDataParallel(self.objective.to(self.device), device_ids=ids, **{name: False})

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        # around the forward, too, or it has no effect
        return contextlib.nullcontext() if last else self.module.no_sync()


class FSDP2(Engine):
    """Every process has a piece of each parameter, gathered unit by unit when it is needed; with `parallel.replicate` pieces are cut within a group (HSDP)."""

    def spread(self) -> FSDPModule:
        parallel, kind = self.recipe.parallel, self.device.type
        shape: tuple[int, ...] = (self.world,)
        names: tuple[str, ...] = ("shard",)
        if parallel.replicate > 1:
            shape, names = (parallel.replicate, self.world // parallel.replicate), ("replicate", "shard")
        mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=names)
        # autocast does what it does in the other modes; here, beside it, weights cross processes in the compute type
        compute = COMPUTE[self.precision]
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # with a type to reduce in, PyTorch asks for gradients of units that were not called, as an average's are not in training
        no_gradients = MixedPrecisionPolicy(param_dtype=compute, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if parallel.offload else OffloadPolicy()
        from_first = _from_first(self.recipe)
        given = self.objective.state_dict() if from_first and self.rank == 0 else {}
        units = self.objective.shard_units()
        kept = set()
        if parallel.frozen == "replicated":
            frozen = [u for u in units[:-1] if not any(p.requires_grad for p in u.parameters())]
            units = [u for u in units if u not in frozen]
            kept = {p for u in frozen for p in u.parameters()}
        # nothing of ours changes one in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for unit in units:
            # resharded after forward even where it is the root: a teacher has no backward that would do it
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy if any(p.requires_grad for p in unit.parameters()) else no_gradients,
                offload_policy=offload,
                reshard_after_forward=True,
                ignored_params=kept,
            )
        if any(p.is_meta for p in self.objective.parameters()):
            self.objective.to_empty(device="cpu" if parallel.offload else self.device)
        for tensor in (*kept, *self.objective.buffers()):
            tensor.data = tensor.data.to(self.device)
        if from_first:  # tensor by tensor, so that only process 0 ever holds all of them
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(self.objective, given, options=options)
        register_fsdp_forward_method(self.objective, "pictures")
        return self.objective  # type: ignore[return-value]

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        return contextlib.nullcontext()
