"""From `parallel.mode` to the engine of that mode."""

from __future__ import annotations

import torch

from pretrain import kernels
from pretrain.kernels.trial import calls_of
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.parallel.engine import COMPUTE, DDP, Engine
from pretrain.parallel.fsdp2 import FSDP2
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe


def check_engine(objective: Objective, recipe: Recipe, device: torch.device) -> None:
    """Raises ConfigError for what this rank's engine would lack: a library, or a kernel that is asked for by name. No
    collectives, so that one rank may fail alone."""
    kernels.kernels_of(device, recipe.parallel.attention, COMPUTE[recipe.precision], calls_of(objective))
    if recipe.parallel.mode.startswith("zero"):
        from pretrain.parallel import deepspeed

        deepspeed.import_deepspeed(device)


def build_engine(objective: Objective, recipe: Recipe, device: torch.device) -> Engine:
    """The engine of a recipe. The objective has the same weights on every rank, or no weights where
    `fsdp2.starts_empty`."""
    parallel_checks.check(recipe, processes.world())
    mode = recipe.parallel.mode
    if mode.startswith("zero"):
        from pretrain.parallel.deepspeed import Zero  # DeepSpeed is an extra

        return Zero(objective, recipe, device)
    return {"single": Engine, "ddp": DDP, "fsdp2": FSDP2}[mode](objective, recipe, device)
