"""ZeRO (arXiv 1910.02054) with DeepSpeed. Stage 1 shards the optimizer state over the ranks, stage 2 also the
gradients, stage 3 also the parameters.

DeepSpeed wraps the objective and our optimizer, but its checkpoint format is not used. Weights and optimizer state are
saved under the same names as in every other mode, so a run can be resumed in another mode and with another number of
processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from common.errors import ConfigError
from pretrain.objectives.base import Batch, Objective
from pretrain.ops.parameter_shards import whole
from pretrain.parallel.engine import COMPUTE, Engine, Judge, clip_factor, total_norm
from pretrain.recipes.recipe import Recipe

AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose weights autocast casts to the compute dtype


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, configure it for the device, and return the module. Raises ConfigError if it is not
    installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "parallel.mode = zero…: DeepSpeed is not installed; run pip install 'unlabeled[deepspeed]',"
            " or write parallel.mode=fsdp2"
        ) from None
    if device.type == "cpu":  # gloo replaces DeepSpeed's shared-memory collectives, which take minutes to compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    # DeepSpeed warns of optimizers that it has not tested with ZeRO; our own tests cover them.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    return deepspeed


def _allocate(objective: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by uninitialised tensors on the CPU. They take no physical
    memory, because nothing is written to them before they are sharded."""
    made: dict[Tensor, nn.Parameter] = {}  # meta parameter → its replacement; several modules may share a parameter
    for module in objective.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                made.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad))
                setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))


class Zero(Engine):
    """`parallel.mode: zero1 | zero2 | zero3`. DeepSpeed reduces gradients over the ranks after every micro-batch in
    stages 2 and 3, and only after the last micro-batch of a step in stage 1."""

    def __init__(self, objective: Objective, recipe: Recipe, device: torch.device):
        self.stage = int(recipe.parallel.mode[-1])
        self.deepspeed = import_deepspeed(device)
        super().__init__(objective, recipe, device)
        self.names = {p: name for name, p in objective.named_parameters() if p.requires_grad}
        self.deepspeed_clips = self.clip is not None and recipe.optim.clip_scope == "global"
        # (options, names of the parameters) of each parameter group, as in the other modes, for checkpoints. They are
        # recorded here, because the groups are divided below, and `deepspeed.initialize` replaces the parameters of the
        # optimizer by one flat tensor per group.
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        members = [[self.names[p] for p in g["params"]] for g in self.optimizer.param_groups]
        self.groups = list(zip(options, members, strict=True))
        self.flat_clip_groups = self._divide_groups()  # the clipping group of each flat tensor
        if self.stage == 3:
            self._shard_parameters()
        self.module, *_ = self.deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=self._config(), dist_init_required=False
        )
        self.zero = self.module.optimizer  # DeepSpeed's wrapper around our optimizer
        # This rank's shard of the fp32 parameters, one flat tensor per parameter group.
        self.flat = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        if self.stage == 3:  # DeepSpeed divides a large parameter group into several flat tensors
            group_of = self.zero.sub_group_to_group_id
            self.flat_clip_groups = [self.flat_clip_groups[group_of[i]] for i in range(len(self.flat))]
        self.norms: list[Tensor] = []  # gradient norm of each flat tensor in this step, over all ranks
        self.updates = 0  # number of flat tensors that are updated, or whose update has begun, in this step
        for method in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            setattr(self.zero, method, self._recorded(getattr(self.zero, method)))
        self._begin_states()
        self.mesh = dist.init_device_mesh(device.type, (self.world,), mesh_dim_names=("shard",))
        self.verdict: Tensor | None = None  # the result of `judge` in this step; None before it is called
        self.judge: Judge | None = None  # the argument `judge` of the current `step`
        self.optimizer.register_step_pre_hook(lambda *_: self._before_update())

    def wrap(self) -> Any:
        self.deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        # DeepSpeed's forward disables an autocast context around it, so autocast is entered inside of it. With
        # autocast, gradients stay in fp32.
        forward = self.objective.forward

        def in_compute_precision(batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            with self.autocast():
                return forward(batch, step)

        self.objective.forward = in_compute_precision  # type: ignore[method-assign]
        if self.stage < 3:
            return self.objective.to(self.device)
        _allocate(self.objective)
        return self.objective

    def _divide_groups(self) -> list[str]:
        """Divide the optimizer's parameter groups by clipping group (`clip_groups`). Returns the clipping group of each
        parameter group."""
        groups: list[dict[str, Any]] = []
        names: list[str] = []
        for group in self.optimizer.param_groups:
            members: dict[str, list[Tensor]] = {}
            for p in group["params"]:
                members.setdefault(self.clip_groups[p], []).append(p)
            groups += [{**group, "params": parameters} for parameters in members.values()]
            names += members
        self.optimizer.param_groups = groups
        return names

    def _recorded(self, norm_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A method of DeepSpeed that computes the gradient norm of one flat tensor, which also appends it to `norms`.
        In each step, DeepSpeed calls it once for each flat tensor, in their order."""

        def recorded(*arguments: Any, **options: Any) -> Tensor:
            self.norms.append(norm_of(*arguments, **options))
            return self.norms[-1]

        return recorded

    def _shard_parameters(self) -> None:
        """Move the parameters to the device and shard them one by one, so that the whole objective is never on the
        device of a rank. Frozen teachers are sharded, too. Ranks on which the weights were not initialised
        receive those of rank 0. Collective: every rank must call it."""
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        for module in self.objective.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        for buffer in self.objective.buffers():
            dist.broadcast(buffer, src=0)
        self.deepspeed.zero.Init(module=self.objective, config_dict_or_path=self._config())
        if self.precision == "fp32":
            return
        # Gather these weights in the compute dtype, which halves the traffic. Autocast would cast them to it anyway.
        # Gradients are reduced in fp32.
        for module in self.objective.modules():
            if isinstance(module, AUTOCAST):
                for parameter in module.parameters(recurse=False):
                    parameter.comm_dtype = COMPUTE[self.precision]  # type: ignore[attr-defined]

    def _config(self) -> dict[str, Any]:
        """The config that DeepSpeed takes."""
        # of a budget: about so many; DeepSpeed does not compare it with the batches
        micro_samples = max(1, self.recipe.data.batch_size // (self.world * self.accumulate))
        zero: dict[str, Any] = {
            "stage": self.stage,
            # 0: all parameters are sharded. Above 0, small parameters would stay gathered, and the EMA of a teacher
            # would not update its small parameters.
            "stage3_param_persistence_threshold": 0,
        }
        if self.recipe.parallel.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": micro_samples,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip if self.deepspeed_clips else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }

    def _begin_states(self) -> None:
        """Create the optimizer state now rather than in the first step, so that a checkpoint can be loaded into it."""
        for flat in self.flat:
            if not self.optimizer.state[flat]:
                self.optimizer.state[flat] = self.optimizer.begin(flat)
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    # ------------------------------------------------ a step
    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.seed(step)
        return self.module(batch, step)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)  # DeepSpeed divides the loss by the number of micro-batches
        if self.micro < self.accumulate:
            self.module.step()  # must be called once per micro-batch; only the call after the last one updates weights

    def step(self, lr: float, weight_decay: float, judge: Judge | None = None) -> Tensor:
        self.set_rates(lr, weight_decay)
        self.verdict, self.judge = None, judge
        self.norms, self.updates = [], 0
        self.module.step()
        norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32, device=self.device).reshape(())
        if self.verdict is None and judge:  # the norm is not finite, so DeepSpeed has not called the optimizer
            judge(norm)
            if self.stage < 3 and self.recipe.parallel.offload:
                # With offload, DeepSpeed 0.19 does not clear these buffers, which it has for models that are not fp32.
                self.zero.averaged_gradients.clear()
        self.micro = 0
        return norm

    def _before_update(self) -> None:
        """Hook before each `optimizer.step`, which DeepSpeed calls once per flat tensor. Before the first of these
        calls in a step, when the norm is known and no parameter has been updated, call `judge` to decide whether the
        update is skipped. DeepSpeed clips by the norm of all gradients only; with another `optim.clip_scope`, the
        gradient of the flat tensor is clipped here."""
        flat, name = self.flat[self.updates], self.flat_clip_groups[self.updates]
        self.updates += 1
        if self.clip is not None and not self.deepspeed_clips:
            norm = total_norm([n for n, other in zip(self.norms, self.flat_clip_groups, strict=True) if other == name])
            flat.grad.mul_(clip_factor(self.clip, norm).to(flat.device))
        if self.verdict is None and self.judge is not None:
            norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32, device=self.device).reshape(())
            self.verdict = self.judge(norm)
        # `to`: with offload, the optimizer runs on the CPU.
        self.optimizer.found_inf = None if self.verdict is None else self.verdict.to(self.flat[0].device)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        # DeepSpeed's hooks gather the parameters of sub-modules. Parameters of the objective itself are gathered here.
        direct = list(self.objective.parameters(recurse=False))
        gathered = (
            self.deepspeed.zero.GatheredParameters(direct) if self.stage == 3 and direct else contextlib.nullcontext()
        )
        with gathered:
            return super().pictures(batch)

    # ------------------------------------------------ state
    def _rows(self, value: Tensor) -> DTensor:
        """This rank's shard of a replicated tensor along dimension 0, as a DTensor with the layout of FSDP2."""
        chunks = value.detach().chunk(self.world)
        shard = chunks[self.rank].clone() if self.rank < len(chunks) else value.new_empty(0, *value.shape[1:])
        return DTensor.from_local(
            shard, self.mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride()
        )

    def state_dict(self) -> dict[str, Any]:
        model: dict[str, Any] = {}
        for name, value in self.objective.state_dict(keep_vars=True).items():
            sharded = self.stage == 3 and isinstance(value, torch.nn.Parameter)
            model[name] = self._rows(whole(value)) if sharded else value.detach()
        # `shaped`: names of the entries of the optimizer state that have the shape of the parameter. All other entries
        # are scalars that are equal for all parameters.
        full, shaped = self.deepspeed.utils.safe_get_full_optimizer_state, self.optimizer.state_names
        scalars = {key: value for key, value in self.optimizer.state[self.flat[0]].items() if key not in shaped}
        state = {
            name: {key: value.clone() for key, value in scalars.items()}
            | {key: self._rows(full(p, key)) for key in shaped}
            for p, name in self.names.items()
        }
        groups = [{**options, "params": names} for options, names in self.groups]
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}, "scale": self.scale.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        tools = self.deepspeed.utils
        for name, target in self.objective.state_dict(keep_vars=True).items():
            value = whole(state["model"][name])
            if hasattr(target, "ds_tensor"):  # ZeRO-3: this rank's shard of the flattened and padded parameter
                shard = target.ds_tensor
                padded = value.new_zeros(shard.numel() * self.world)
                padded[: value.numel()] = value.reshape(-1)
                shard.copy_(padded.view(self.world, -1)[self.rank])
            else:
                target.copy_(value)
            if target in self.names:
                tools.safe_set_full_fp32_param(target, value)
        saved = state["optimizer"]["state"]
        shaped = self.optimizer.state_names
        for p, name in self.names.items():
            for key in shaped:
                tools.safe_set_full_optimizer_state(p, whole(saved[name][key]), key)
        for key, value in next(iter(saved.values())).items():
            for flat in self.flat if key not in shaped else ():
                self.optimizer.state[flat][key].copy_(value)
        self.scale.load_state_dict(state["scale"])
