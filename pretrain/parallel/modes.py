"""Build the engine of a `parallel.mode`."""

from __future__ import annotations

import torch

from pretrain import kernels
from pretrain.kernels.kernel_checks import calls_of
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.parallel.engine import COMPUTE, DDP, Engine
from pretrain.parallel.fsdp2 import FSDP2
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe


def check_engine(objective: Objective, recipe: Recipe, device: torch.device) -> None:
    """Raises ConfigError if this rank lacks a library, or a kernel that the recipe names. It calls no collectives, so
    that it may fail on one rank only."""
    kernels.kernels_of(device, recipe.parallel.attention, COMPUTE[recipe.precision], calls_of(objective))
    if recipe.parallel.mode.startswith("zero"):
        from pretrain.parallel import deepspeed

        deepspeed.import_deepspeed(device)


def build_engine(objective: Objective, recipe: Recipe, device: torch.device) -> Engine:
    """The engine of a recipe. The objective has the same weights on every rank, except on ranks for which
    `fsdp2.starts_empty` is true: there it has none."""
    parallel_checks.check(recipe, processes.world())
    mode = recipe.parallel.mode
    if mode.startswith("zero"):
        from pretrain.parallel.deepspeed import Zero  # DeepSpeed is an extra

        return Zero(objective, recipe, device)
    return {"single": Engine, "ddp": DDP, "fsdp2": FSDP2}[mode](objective, recipe, device)
