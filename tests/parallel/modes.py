"""One process of one mode: train objectives for a few steps on given batches, and write the results to a file."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from data_pipeline.stream.stream import Stream
from data_pipeline.stream.worker import collated
from pretrain import step as training_step
from pretrain.build import build_objective, open_samples, placed, views
from pretrain.objectives.base import Objective
from pretrain.ops.cross_entropy import IGNORED
from pretrain.ops.parameter_shards import whole, whole_state
from pretrain.ops.queue import Queue
from pretrain.ops.sync_norm import BatchNorm
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import engine as engines
from pretrain.parallel import fsdp2, processes
from pretrain.parallel.device import pick_device
from pretrain.parallel.modes import build_engine
from pretrain.recipes.recipe import Recipe
from tests.conftest import tiny_recipe

STEPS, BATCH, ACCUMULATE, LR = 4, 8, 2, 5e-4
# Objectives whose gradients are clipped module by module; the others are clipped by their norm over all modules.
CLIPPED_BY_MODULE = ("dinov3", "mae", "simclr")


class Whole(dict[str, Tensor]):
    """A micro-batch of all processes, and the views that have made it."""

    views: Any


def batches(cfg: Recipe, shards: Path, count: int) -> list[Whole]:
    """Whole micro-batches of real data, the same on every process."""
    model, samples = build_objective(cfg), open_samples(cfg)
    make = views(cfg, model, samples)
    stream = Stream(samples, make, BATCH, workers=0, parts=model.parts)
    out = [Whole(placed(model, next(stream), torch.device("cpu"))) for _ in range(count)]
    for batch in out:
        batch.views = make
    for number, batch in enumerate(out if model.target_name else ()):
        targets = batch[model.target_name]
        for row in range(BATCH):  # so that the number of targets differs by process and by micro-batch
            targets[row, : (row + number) * targets.shape[1] // (3 * BATCH)] = IGNORED
    return out


def mine(batch: Whole) -> dict[str, Tensor]:
    """This process's samples of a batch, with the arrays that its data workers would collate from them."""
    made = collated(batch.views, {key: value.numpy() for key, value in batch.items()})
    rows = {k: v.chunk(processes.world())[processes.rank()] for k, v in batch.items() if k not in made}
    own = collated(batch.views, {key: value.numpy() for key, value in rows.items()})
    return rows | {key: torch.from_numpy(value) for key, value in own.items()}


def recipe_of(name: str, shards: Path, mode: str, options: dict[str, Any]) -> Recipe:
    # a large eps: where a gradient is zero but for rounding (a key's bias), Adam would make steps of the rounding
    options = {"parallel.accumulate_coupled": True, "optim.clip": 1.0, "optim.eps": 1e-3, **options}
    if name in CLIPPED_BY_MODULE:  # a limit that every module exceeds
        options |= {"optim.clip": 0.05, "optim.clip_scope": "module"}
    whole = BATCH * ACCUMULATE
    micro = f"parallel.micro_batch={whole // ACCUMULATE // processes.world()}"
    texts = [f"{key}={value}" for key, value in options.items()]
    return tiny_recipe(name, shards, Path("unused"), f"parallel.mode={mode}", f"data.batch={whole}", micro, *texts)


def one_step(
    engine: engines.Engine, guard: Guard, data: list[dict[str, Tensor]], step: int, poison: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Train one step. Returns (mean loss, mean logs, gradient norm). `poison`: whether the last micro-batch is not
    finite; of one of whole numbers it is the count of targets."""
    plain, calls = engine.forward, itertools.count(1)

    def forward(batch: dict[str, Tensor], step: int) -> Any:
        return plain(poisoned(batch) if poison and next(calls) == engine.accumulate else batch, step)

    with mock.patch.object(engine, "forward", forward):
        values = training_step.one_step(engine, guard, data[: engine.accumulate], step, LR, weight_decay=0.05)
    loss, norm = values.pop("loss"), values.pop("grad_norm")
    return processes.mean(loss), processes.mean(torch.stack([torch.zeros_like(loss), *values.values()])[1:]), norm


def everything(engine: engines.Engine) -> dict[str, Tensor]:
    """Gathered copies of weights, buffers and optimizer state."""
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


def in_float64(model: Objective, cfg: Recipe) -> bool:
    """Whether an objective is compared in float64: where several batch norms divide the almost equal features of an
    untrained network by their small spread, one after the other, rounding to fp32 is 1000 times as large two steps
    later."""
    return sum(isinstance(module, BatchNorm) for module in model.modules()) > 1 and cfg.precision == "fp32"


@contextlib.contextmanager
def float64(model: Objective) -> Iterator[None]:
    """Engines that are built within do not round the model, which becomes float64, to fp32."""
    model.double()
    plain = functools.partial(fsdp2.MixedPrecisionPolicy, cast_forward_inputs=False)
    with mock.patch.object(fsdp2, "MixedPrecisionPolicy", lambda **_: plain()):
        yield


def train(cfg: Recipe, data: list[dict[str, Tensor]], device: torch.device) -> dict[str, Any]:
    """Losses and gradient norms of each step, and the weights and exported tensors after all steps, on every process."""
    model = build_objective(cfg, empty=fsdp2.starts_empty(cfg))
    wide = in_float64(model, cfg)
    with float64(model) if wide else contextlib.nullcontext():
        engine = build_engine(model, cfg, device)
    guard = Guard(model, cfg.skip, device)
    out: dict[str, Any] = {"loss": [], "norm": [], "logs": [], "validated": []}
    parts = [{key: value.to(device) for key, value in mine(batch).items()} for batch in data]
    if wide:
        parts = [{k: v.double() if v.is_floating_point() else v for k, v in part.items()} for part in parts]
    for step in range(STEPS):
        loss, logs, norm = one_step(engine, guard, parts[step * engine.accumulate :], step)
        out["loss"].append(float(loss))
        out["logs"].append(logs.tolist())
        out["norm"].append(float(norm))
        if model.validates:  # as a run does between two steps; the next step has to find the engine as it was
            out["validated"].append(float(processes.mean(engine.validate(parts, step))))
    pictures = engine.pictures(parts[0])
    assert all(p.dtype == torch.uint8 for p in pictures.values())
    out["weights"] = whole_state(model)
    out["queues"] = [f"{name}.rows" for name, module in model.named_modules() if isinstance(module, Queue)]
    # of rank 0; the others have none
    out["exports"] = {f"{name}.{k}": v for name, one in engine.encoder_states().items() for k, v in one.items()}

    before = everything(engine)
    one_step(engine, guard, parts, STEPS, poison=True)
    after = everything(engine)
    out["skipped"] = float(guard.skipped)
    out["changed"] = [key for key in before if not torch.equal(before[key], after[key]) and not key.startswith("scale")]
    one_step(engine, guard, parts, STEPS + 1)  # and it goes on
    states = {k: v for k, v in everything(engine).items() if k.rpartition(".")[2] in engine.optimizer.state_names}
    assert states
    out["stuck"] = [key for key, value in states.items() if value.any() and torch.equal(value, after[key])]
    return out


def main(
    shards: Path, mode: str, options: dict[str, Any], target: Path, names: list[str], device_name: str = "cpu"
) -> None:
    device = pick_device(device_name)
    processes.start(mode, device)
    torch.set_num_threads(1)
    found = {}
    for name in names:
        own = {key: value for key, value in options.items() if not isinstance(value, dict)} | options.get(name, {})
        cfg = recipe_of(name, shards, mode, own)
        found[name] = train(cfg, batches(cfg, shards, STEPS * ACCUMULATE), device)
    torch.save(found, target / f"{processes.rank()}.pt")
    processes.stop()
