"""One process of one mode: train every objective for a few steps on given batches and write down what came out. `python -m tests.parallel.modes JOB`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.shards import Samples
from data_pipeline.stream import Stream, to_device
from pretrain import config, objective
from pretrain.guard import Guard
from pretrain.parallel import engine as engines
from pretrain.parallel import processes
from pretrain.parallel.device import pick_device
from pretrain.parallel.shards import whole_state
from pretrain.recipe import Recipe
from pretrain.train import build_objective
from tests.conftest import tiny_recipe

STEPS, BATCH, ACCUMULATE, LR = 4, 8, 2, 5e-4


def batches(cfg: Recipe, shards: Path, count: int) -> list[dict[str, Tensor]]:
    """Whole micro-batches of real images, the same on every process."""
    model = build_objective(cfg)
    body = model.encoder()
    views = type(model).views(cfg.objective, body.image_size, body.patch_size)
    stream = Stream(Samples([str(shards)]), views, BATCH, workers=0)
    return [to_device(next(stream), torch.device("cpu"), cfg.data.mean, cfg.data.std) for _ in range(count)]


def mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.chunk(processes.world())[processes.rank()] for key, value in batch.items()}


def recipe_of(name: str, shards: Path, mode: str, options: dict[str, Any]) -> Recipe:
    # a large eps: where a gradient is zero but for rounding (a key's bias), Adam would make steps of the rounding
    options = {"parallel.accumulate_coupled": True, "optim.clip": 1.0, "optim.eps": 1e-3, **options}
    whole = BATCH * ACCUMULATE
    micro = f"parallel.micro_batch={whole // ACCUMULATE // processes.world()}"
    texts = [f"{key}={value}" for key, value in options.items()]
    return tiny_recipe(name, shards, Path("unused"), f"parallel.mode={mode}", f"data.batch={whole}", micro, *texts)


def train(cfg: Recipe, data: list[dict[str, Tensor]], device: torch.device) -> dict[str, Any]:
    """Losses and gradient norms of each step, and the weights after them, as every process sees them."""
    model = build_objective(cfg)
    engine = engines.build(model, cfg, device)
    guard = Guard(model, cfg.skip, device)
    out: dict[str, Any] = {"loss": [], "norm": [], "logs": []}
    for step in range(STEPS):
        guard.before()
        losses, logs = [], []
        for micro in range(engine.accumulate):
            with engine.microbatch(last=micro + 1 == engine.accumulate):
                loss, log = engine.forward(mine(data[step * engine.accumulate + micro]), step)
                engine.backward(loss)
            losses.append(loss.detach().float())
            logs.append(torch.stack([v.float() for v in log.values()]) if log else torch.zeros(0))
        mean = torch.stack(losses).mean()
        norm = engine.step(LR, 0.05, lambda norm, mean=mean: guard.judge(mean, norm))
        guard.after()
        model.after_step(step)
        out["loss"].append(float(processes.mean(mean)))
        out["logs"].append(processes.mean(torch.stack(logs).mean(0)).tolist())
        out["norm"].append(float(norm))
    pictures = engine.pictures(mine(data[0]))
    assert all(p.dtype == torch.uint8 for p in pictures.values())
    out["weights"] = whole_state(model)
    return out


def main(shards: Path, mode: str, options: dict[str, Any], target: Path) -> None:
    device = processes.start(mode, pick_device("cpu"))
    torch.set_num_threads(1)
    found = {}
    for name in objective.names():
        own = {key: value for key, value in options.items() if not isinstance(value, dict)} | options.get(name, {})
        cfg = recipe_of(name, shards, mode, own)
        found[name] = train(cfg, batches(cfg, shards, STEPS * ACCUMULATE), device)
    torch.save(found, target / f"{processes.rank()}.pt")
    processes.stop()


if __name__ == "__main__":
    job = config.read_yaml(Path(sys.argv[1]))
    main(Path(job["shards"]), job["mode"], job["options"], Path(job["target"]))
