"""Engine: run an objective on the processes and devices of a run, with precision, gradient accumulation, the
optimizer's step, and state dicts.

The training loop and the objectives do not depend on the mode; a new mode is a subclass with these methods. `modes.py`
maps `parallel.mode` to a class. This file has those for one process (Engine) and for replicas (DDP); those in
`fsdp2.py` and `deepspeed.py` shard.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import ConfigError
from pretrain import kernels
from pretrain.objectives.base import Batch, Objective
from pretrain.ops.parameter_shards import local, whole_state
from pretrain.optim.groups import clip_groups, make_optimizer
from pretrain.parallel import blocks, processes
from pretrain.parallel.device import set_tf32
from pretrain.parallel.loss_scale import LossScale
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Judge = Callable[[Tensor], Tensor]  # gradient norm → a scalar on the device; 1.0 skips the update


def accumulation(recipe: Recipe, coupled: bool, world: int = 1) -> int:
    """The number of micro-batches per step and rank. `coupled`: `Objective.is_coupled`. Raises ConfigError if
    `parallel.micro_batch` does not divide the rank's samples, or if micro-batches would change the loss."""
    count, micro = parallel_checks.micro_batches(recipe, world), recipe.parallel.micro_batch
    if isinstance(micro, int) and count > 1 and coupled and not recipe.parallel.accumulate_coupled:
        raise ConfigError(
            f"parallel.micro_batch = {micro}: the loss of {recipe.objective.name} couples the samples of a batch"
            f" (by the method, or by batch norms), so {count} micro-batches are not equal to one batch of"
            f" {recipe.data.batch_size}; write"
            " parallel.micro_batch=null, or parallel.accumulate_coupled=true if that is what you want"
        )
    return count


def clip_factor(limit: float, norm: Tensor) -> Tensor:
    """The factor that scales a gradient of this norm down to `limit`, or 1: a scalar on the device of `norm`."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def total_norm(norms: list[Tensor]) -> Tensor:
    """The norm of a gradient from the norms of its parts."""
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


class Engine:
    """One process, one device (`parallel.mode: single`)."""

    def __init__(self, objective: Objective, recipe: Recipe, device: torch.device):
        self.device, self.recipe = device, recipe
        self.rank, self.world = processes.rank(), processes.world()
        self.accumulate = accumulation(recipe, objective.is_coupled(), self.world)
        self.precision, self.clip, self.micro = recipe.precision, recipe.optim.clip, 0
        self.scale = LossScale(device, self.precision == "fp16")
        set_tf32(self.precision != "fp32")
        self.objective = objective
        # lines for the log: which kernels were chosen
        self.notes = kernels.apply(objective, device, recipe.parallel.attention, COMPUTE[self.precision])
        blocks.prepare(objective, recipe.parallel.recompute, recipe.parallel.compile)
        self.module = self.wrap()
        self.optimizer = make_optimizer(objective, recipe.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # {parameter: its clipping group; the gradients of a group share one norm}, see `optim.clip_scope`
        self.clip_groups = clip_groups(objective, recipe.optim)

    def wrap(self) -> Any:
        """Move the objective to the device and wrap it for `parallel.mode`. Returns the module to call in its place."""
        return self.objective.to(self.device)

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        """Context around forward and backward of one micro-batch. Gradients are reduced over ranks only in the last
        micro-batch of a step."""
        return contextlib.nullcontext()

    def seed(self, step: int) -> None:
        """Seed dropout and drop path from (seed, step, micro-batch, rank), so that a resumed run draws the same
        numbers."""
        words = np.random.SeedSequence([self.recipe.seed, step, self.micro, self.rank]).generate_state(2)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        self.micro += 1

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, logs) of the objective, computed in the run's precision. The logs are copies, because an objective may
        log a parameter itself, whose memory FSDP frees after the backward."""
        self.seed(step)
        with self.autocast():
            loss, logs = self.module(batch, step)
        return loss, {key: value.clone() for key, value in logs.items()}

    def micro_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step.

        If the number of targets varies (`Objective.target_name`), all micro-batches are fetched first, and each gets
        "count": the mean number of targets over micro-batches and ranks. The mean of the micro-batches' losses is then
        the mean over the targets of the global batch.
        """
        if self.objective.target_name is None:
            yield from batches
            return
        held = list(batches)
        count = processes.mean(torch.stack([self.objective.count(batch) for batch in held]).float().mean())
        for batch in held:
            yield batch | {"count": count.clamp_min(1e-9)}

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, COMPUTE[self.precision], enabled=self.precision != "fp32")

    def backward(self, loss: Tensor) -> None:
        self.scale.scale_loss(loss / self.accumulate).backward()

    def step(self, lr: float, weight_decay: float, judge: Judge | None = None) -> Tensor:
        """Clip the gradients, update the weights, and set the gradients to zero. Returns the global gradient norm
        before clipping, a scalar on the device.

        `judge(norm)` returns a scalar on the device; 1.0 skips the update (the optimizer gets it as `found_inf`).
        """
        self.set_rates(lr, weight_decay)
        gradients: dict[str, list[Tensor]] = {}  # of each clipping group
        for p in self.parameters:
            if p.grad is not None:
                gradients.setdefault(self.clip_groups[p], []).append(p.grad)
        pieces = {name: [local(g) for g in group] for name, group in gradients.items()}
        self.scale.unscale([piece for group in pieces.values() for piece in group])
        norms = {name: self._norm(group) for name, group in gradients.items()}
        norm = total_norm(list(norms.values()))
        # a blocking copy with offload: the optimizer's own is asynchronous, and it would read the value before it is
        # there
        self.optimizer.found_inf = judge(norm).to(local(self.parameters[0]).device) if judge else None
        self.scale.adapt(norm)
        if self.clip is not None:
            for name, group in pieces.items():
                torch._foreach_mul_(group, clip_factor(self.clip, norms[name]).to(group[0].device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.micro = 0
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of gradients over all ranks, a scalar on the device. Collective with sharded gradients."""
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norm.to(self.device)  # the norm of offloaded gradients is on the CPU

    def set_rates(self, lr: float, weight_decay: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["wd_scale"]

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], step: int) -> Tensor:
        """The mean loss of this rank's held-out micro-batches, a scalar on the device. Collective: every rank must call
        it between two steps."""
        losses = [self.forward(batch, step)[0].float() for batch in self.micro_batches(batches)]
        self.micro = 0
        return torch.stack(losses).mean()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's pictures of a batch, in evaluation mode, so that they change no running statistics. Collective:
        every rank must call it."""
        training = self.objective.training
        self.objective.eval()
        try:
            with self.autocast():
                return self.objective.pictures(batch)
        finally:
            self.objective.train(training)

    def encoder_states(self) -> dict[str, dict[str, Tensor]]:
        """{export's name: the state dict of `Exported.state`, in main memory} on rank 0, empty dicts elsewhere. Collective:
        every rank must call it."""
        gathered = functools.partial(whole_state, keep=self.rank == 0)
        return {name: one.state(gathered) for name, one in self.objective.exports().items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state by parameter name, for DCP; the keys are the same in every mode."""
        model, optimizer = get_state_dict(self.objective, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scale": self.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        set_state_dict(
            self.objective, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # not those of the checkpoint: a new run that begins there may have others
        self.scale.load_state_dict(state["scale"])


class DDP(Engine):
    """Every rank has all weights; gradients are all-reduced during backward."""

    def wrap(self) -> DistributedDataParallel:
        ids = [self.device.index] if self.device.type == "cuda" else None
        # buffers need no broadcast: our batch norm computes them from the samples of all ranks
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.14
        options: dict[str, Any] = {name: False}
        # Blocks are compiled one by one, so gradients are reduced while other blocks are still computed. By default,
        # torch would cut graphs inside DDP at the borders of its buckets: a block of more than 25 MB into several.
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(
            self.objective.to(self.device), device_ids=ids, gradient_as_bucket_view=True, **options
        )

    def microbatch(self, last: bool) -> contextlib.AbstractContextManager:
        # no_sync has an effect only if it is also around the forward
        return contextlib.nullcontext() if last else self.module.no_sync()
