"""ZeRO (arXiv 1910.02054) by DeepSpeed: stage 1 cuts the optimizer's state, 2 the gradients too, 3 also the parameters.

DeepSpeed wraps the objective and our own AdamW. Its checkpoints are not used: weights and optimizer state go through ours, under the same names as in
every mode, so that a run may change the mode and the number of processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pretrain.config import ConfigError
from pretrain.models.layers import Block, LayerScale
from pretrain.objectives.base import Batch, Objective
from pretrain.parallel.engine import Engine, Judge
from pretrain.parallel.shards import whole
from pretrain.recipe import Recipe


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "parallel.mode = zero…: DeepSpeed is not installed; run pip install 'unlabeled[deepspeed]', or write parallel.mode=fsdp2"
        ) from None
    if device.type == "cpu":  # an operation that it would compile for minutes at the start; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.* is deprecated", category=FutureWarning
    )  # by DeepSpeed
    return deepspeed


class Zero(Engine):
    """`parallel.mode: zero1 | zero2 | zero3`. With stages 2 and 3 DeepSpeed reduces the gradients of every micro-batch."""

    def __init__(self, objective: Objective, recipe: Recipe, device: torch.device):
        self.stage = int(recipe.parallel.mode[-1])
        self.deepspeed = _import(device)
        super().__init__(objective, recipe, device)
        self.names = {p: name for name, p in objective.named_parameters() if p.requires_grad}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        members = [[self.names[p] for p in g["params"]] for g in self.optimizer.param_groups]
        self.groups = list(
            zip(groups, members, strict=True)
        )  # as they were, before DeepSpeed puts flat tensors in their place
        self.module, *_ = self.deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=self._config(), dist_init_required=False
        )
        self.zero = self.module.optimizer
        self.flat = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        self._begin_states()
        self.mesh = dist.init_device_mesh(device.type, (self.world,), mesh_dim_names=("shard",))
        self.verdict: Tensor | None = None
        self.judge: Judge | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self._ask())

    def spread(self) -> Any:
        self.deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        for block in (
            self.objective.modules()
        ):  # a block reads its layer scales itself: the linear layers before them apply them
            for part in block.children() if isinstance(block, Block) else ():
                if isinstance(part, LayerScale):
                    self.deepspeed.zero.register_external_parameter(block, part.gamma)
        # autocast inside of DeepSpeed's call, which would switch off one around it: gradients and gathered weights stay in fp32
        forward = self.objective.forward

        def in_compute_precision(batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
            with self.autocast():
                return forward(batch, step)

        self.objective.forward = in_compute_precision  # type: ignore[method-assign]
        return self.objective.to(self.device)

    def _config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "stage3_param_persistence_threshold": 0,  # else small parameters stay gathered, and a teacher's stale
        }
        if self.recipe.parallel.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": self.recipe.data.batch // (self.world * self.accumulate),
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }

    def _begin_states(self) -> None:
        """The optimizer's state as before the first step, so that a checkpoint can be read into it."""
        for flat in self.flat:
            if not self.optimizer.state[flat]:
                step = torch.zeros((), dtype=torch.float32, device=flat.device)
                moments = {key: torch.zeros_like(flat.detach()) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[flat] = {"step": step, **moments}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    # ------------------------------------------------ a step
    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.seed(step)
        return self.module(batch, step)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)  # divides by the number of micro-batches
        if self.micro < self.accumulate:
            self.module.step()  # it wants one for each micro-batch, and updates at the last only

    def step(self, lr: float, weight_decay: float, judge: Judge | None = None) -> Tensor:
        self.set_rates(lr, weight_decay)
        self.verdict, self.judge = None, judge
        self.module.step()
        norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32, device=self.device).reshape(())
        if self.verdict is None and judge:  # DeepSpeed has left the update out by itself: the norm is not finite
            judge(norm)
        self.micro = 0
        return norm

    def _ask(self) -> None:
        """Before each of the optimizer's own steps (there is one for each flat tensor): when the norm is known and nothing has changed yet."""
        if self.verdict is None and self.judge is not None:
            norm = torch.as_tensor(self.zero._global_grad_norm, dtype=torch.float32, device=self.device).reshape(())
            self.verdict = self.judge(norm)
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = self.verdict  # type: ignore[attr-defined]

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        own = list(self.objective.parameters(recurse=False))
        gathered = self.deepspeed.zero.GatheredParameters(own) if self.stage == 3 and own else contextlib.nullcontext()
        with gathered:
            return super().pictures(batch)

    # ------------------------------------------------ state
    def _rows(self, value: Tensor) -> DTensor:
        """This process's rows of a tensor that all have, as FSDP2 cuts it."""
        pieces = value.detach().chunk(self.world)
        own = pieces[self.rank].clone() if self.rank < len(pieces) else value.new_empty(0, *value.shape[1:])
        return DTensor.from_local(own, self.mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())

    def state_dict(self) -> dict[str, Any]:
        model: dict[str, Any] = {}
        for name, value in self.objective.state_dict(keep_vars=True).items():
            cut = self.stage == 3 and isinstance(value, torch.nn.Parameter)
            model[name] = self._rows(whole(value)) if cut else value.detach()
        full = self.deepspeed.utils.safe_get_full_optimizer_state
        steps = self.optimizer.state[self.flat[0]]["step"]
        state = {
            name: {"step": steps.clone(), **{key: self._rows(full(p, key)) for key in ("exp_avg", "exp_avg_sq")}}
            for p, name in self.names.items()
        }
        groups = [{**options, "params": names} for options, names in self.groups]
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}, "scale": self.scale.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        tools = self.deepspeed.utils
        for name, target in self.objective.state_dict(keep_vars=True).items():
            value = whole(state["model"][name])
            if hasattr(target, "ds_tensor"):
                piece = target.ds_tensor
                padded = value.new_zeros(piece.numel() * self.world)
                padded[: value.numel()] = value.reshape(-1)
                piece.copy_(padded.view(self.world, -1)[self.rank])
            else:
                target.copy_(value)
            if target in self.names:
                tools.safe_set_full_fp32_param(target, value)
        saved = state["optimizer"]["state"]
        for p, name in self.names.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tools.safe_set_full_optimizer_state(p, whole(saved[name][key]), key)
        for flat in self.flat:
            self.optimizer.state[flat]["step"].copy_(next(iter(saved.values()))["step"])
        self.scale.load_state_dict(state["scale"])
