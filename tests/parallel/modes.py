"""One process of one mode: train every objective for a few steps on given batches and write down what came out. `python -m tests.parallel.modes JOB`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from data_pipeline.shards import Look
from data_pipeline.stream import Stream
from pretrain import config, objective
from pretrain.guard import Guard
from pretrain.inputs import open_samples, views
from pretrain.parallel import engine as engines
from pretrain.parallel import processes
from pretrain.parallel.device import pick_device
from pretrain.parallel.shards import whole, whole_state
from pretrain.recipe import Recipe
from pretrain.train import build_objective, placed
from tests.conftest import TEXT, tiny_recipe

STEPS, BATCH, ACCUMULATE, LR = 4, 8, 2, 5e-4


def batches(cfg: Recipe, shards: Path, count: int) -> list[dict[str, Tensor]]:
    """Whole micro-batches of real data, the same on every process."""
    model, samples = build_objective(cfg), open_samples(cfg)
    make = views(cfg, model, samples)
    look = Look(()) if cfg.objective.name in TEXT else Look()
    stream = Stream(samples, make, BATCH, workers=0, look=look)
    return [placed(cfg, next(stream), torch.device("cpu")) for _ in range(count)]


def mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.chunk(processes.world())[processes.rank()] for key, value in batch.items()}


def recipe_of(name: str, shards: Path, mode: str, options: dict[str, Any]) -> Recipe:
    # a large eps: where a gradient is zero but for rounding (a key's bias), Adam would make steps of the rounding
    options = {"parallel.accumulate_coupled": True, "optim.clip": 1.0, "optim.eps": 1e-3, **options}
    whole = BATCH * ACCUMULATE
    micro = f"parallel.micro_batch={whole // ACCUMULATE // processes.world()}"
    texts = [f"{key}={value}" for key, value in options.items()]
    return tiny_recipe(name, shards, Path("unused"), f"parallel.mode={mode}", f"data.batch={whole}", micro, *texts)


def one_step(
    engine: engines.Engine, guard: Guard, data: list[dict[str, Tensor]], step: int, poison: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What `pretrain.train` does in a step; (mean loss, mean logs, gradient norm). `poison`: of the last micro-batch."""
    guard.before()
    losses, logs = [], []
    for micro, batch in enumerate(engine.micro_batches(data[: engine.accumulate])):
        with engine.microbatch(last=micro + 1 == engine.accumulate):
            spoilt = poison and micro + 1 == engine.accumulate
            loss, log = engine.forward(poisoned(batch) if spoilt else batch, step)
            engine.backward(loss)
        losses.append(loss.detach().float())
        logs.append(torch.stack([v.float() for v in log.values()]) if log else torch.zeros(0))
    mean = torch.stack(losses).mean()
    norm = engine.step(LR, 0.05, lambda norm: guard.judge(mean, norm))
    guard.after()
    engine.objective.after_step(step)
    return processes.mean(mean), processes.mean(torch.stack(logs).mean(0)), norm


def everything(engine: engines.Engine) -> dict[str, Tensor]:
    """Copies of weights, buffers and optimizer state, gathered."""
    flat, _ = flatten_state_dict(engine.state_dict())
    return {key: whole(value).clone() for key, value in flat.items() if isinstance(value, Tensor)}


def poisoned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with one value that is not finite, on the last process only."""
    if processes.rank() + 1 < processes.world():
        return batch

    def spoil(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value * torch.nan if value.ndim == 0 else value.clone().index_fill_(0, torch.tensor([0]), torch.nan)

    return {key: spoil(value) for key, value in batch.items()}


def train(cfg: Recipe, data: list[dict[str, Tensor]], device: torch.device) -> dict[str, Any]:
    """Losses and gradient norms of each step, and the weights after them, as every process sees them."""
    model = build_objective(cfg, empty=engines.starts_empty(cfg))
    engine = engines.build(model, cfg, device)
    guard = Guard(model, cfg.skip, device)
    out: dict[str, Any] = {"loss": [], "norm": [], "logs": []}
    parts = [mine(batch) for batch in data]
    for step in range(STEPS):
        loss, logs, norm = one_step(engine, guard, parts[step * engine.accumulate :], step)
        out["loss"].append(float(loss))
        out["logs"].append(logs.tolist())
        out["norm"].append(float(norm))
    pictures = engine.pictures(parts[0])
    assert all(p.dtype == torch.uint8 for p in pictures.values())
    out["weights"] = whole_state(model)

    before = everything(engine)
    one_step(engine, guard, parts, STEPS, poison=True)
    after = everything(engine)
    out["skipped"] = float(guard.skipped)
    out["changed"] = [key for key in before if not torch.equal(before[key], after[key]) and not key.startswith("scale")]
    one_step(engine, guard, parts, STEPS + 1)  # and it goes on
    out["stuck"] = [
        key for key, value in everything(engine).items() if "exp_avg." in key and torch.equal(value, after[key])
    ]
    return out


def main(shards: Path, mode: str, options: dict[str, Any], target: Path, names: list[str]) -> None:
    device = processes.start(mode, pick_device("cpu"))
    torch.set_num_threads(1)
    found = {}
    for name in names:
        own = {key: value for key, value in options.items() if not isinstance(value, dict)} | options.get(name, {})
        cfg = recipe_of(name, shards, mode, own)
        found[name] = train(cfg, batches(cfg, shards, STEPS * ACCUMULATE), device)
    torch.save(found, target / f"{processes.rank()}.pt")
    processes.stop()


if __name__ == "__main__":
    job = config.read_yaml(Path(sys.argv[1]))
    names = job.get("objectives") or objective.names()
    main(Path(job["shards"]), job["mode"], job["options"], Path(job["target"]), names)
