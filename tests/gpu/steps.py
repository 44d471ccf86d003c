"""Training steps of an objective with its sizes for tests (`Config.tiny`), on any device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.build import build_objective
from pretrain.optim.skip_steps import Guard
from pretrain.parallel.engine import Engine
from pretrain.parallel.modes import build_engine
from tests.parallel.modes import ACCUMULATE, batches, one_step, recipe_of


def engine_of(name: str, shards: Path, device: torch.device, **options: Any) -> tuple[Engine, Guard]:
    cfg = recipe_of(name, shards, "single", {key.replace("__", "."): value for key, value in options.items()})
    torch.manual_seed(0)
    objective = build_objective(cfg)
    return build_engine(objective, cfg, device), Guard(objective, cfg.skip, device)


def data_of(name: str, shards: Path, device: torch.device, steps: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a number of steps, on the device."""
    made = batches(recipe_of(name, shards, "single", {}), shards, steps * ACCUMULATE)
    return [{key: value.to(device) for key, value in batch.items()} for batch in made]


def losses_of(name: str, shards: Path, device: torch.device, steps: int = 4, **options: Any) -> Tensor:
    """(loss, gradient norm) of each step, [steps, 2], on the host."""
    engine, guard = engine_of(name, shards, device, **options)
    data = data_of(name, shards, device, steps)
    rows = []
    for step in range(steps):
        loss, _, norm = one_step(engine, guard, data[step * ACCUMULATE :], step)
        rows.append(torch.stack([loss, norm]))
    return torch.stack(rows).cpu()
