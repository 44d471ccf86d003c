"""The one loop. `python -m pretrain.train RUN` trains the recipe in a run folder; from Python: `train(load("demo", ["steps=100"]))`."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.batches import Look
from data_pipeline.ledger import Ledger
from data_pipeline.plan import Phase
from data_pipeline.shards import Samples, remember
from data_pipeline.stream import Reading, Stream, default_workers, to_device
from pretrain import auto, checkpoint, collapse, config, export, recipe, weights
from pretrain.config import ConfigError
from pretrain.errors import command
from pretrain.guard import Guard
from pretrain.metrics import Clock, Writer
from pretrain.models import presets
from pretrain.models.layers import Backbone
from pretrain.objective import find
from pretrain.objectives.base import Objective
from pretrain.optim import thaw
from pretrain.parallel import timeouts
from pretrain.parallel.engine import Engine, accumulation, faster_precision, keep_freed_memory, pick_device
from pretrain.recipe import Recipe
from pretrain.run_folder import prepare, write_recipe

STOPPED = 75  # exit code of a run that was told to stop and wrote its checkpoint: the same command goes on
READ_LATER = ("eval.", "checkpoint.", "init.")  # by the evaluation stage; by the first save; by a new run alone
COLLECT = 100  # steps between two runs of Python's garbage collector, on all processes at the same one: none waits for another's


class Stop:
    """Set by SIGTERM, SIGINT or SIGUSR1: the loop ends at the next step, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


def every(step: int, steps: int) -> bool:
    return step > 0 and step % steps == 0


def build_objective(cfg: Recipe, start: bool = False) -> Objective:
    """The recipe's objective on CPU, with the weights that its seed gives; with `start`, also those that its `init` and its own options name."""
    auto.settle(cfg)  # where the data are not known, as for a plan
    torch.manual_seed(cfg.seed)
    with contextlib.nullcontext() if start else weights.unread():
        try:
            objective = find(cfg.objective.name)(cfg.objective, lambda **changes: backbone(cfg, **changes))
            if start:
                objective.started(weights.load_run(objective, cfg.init.run) if cfg.init.run else set())
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return objective


def backbone(cfg: Recipe, **changes: Any) -> Backbone:
    """The recipe's model, with some of its options changed, and the weights that `init.backbone` names."""
    body = presets.build(cfg.model, **changes)
    if cfg.init.backbone:
        weights.load_into(body, cfg.init.backbone)
    return body


def open_samples(cfg: Recipe) -> list[Samples]:
    """The datasets of a recipe: one, or those that it mixes."""
    return [Samples(source.shards) for source in cfg.data.mix] if cfg.data.mix else [Samples(cfg.data.train)]


def phases_of(cfg: Recipe, samples: list[Samples]) -> list[Phase]:
    """The recipe's phases, with every value written out."""
    mix = cfg.data.mix
    own = [float(len(s)) if source.weight is None else source.weight for s, source in zip(samples, mix, strict=False)]
    now = Phase(0, cfg.data.batch, tuple(own or [1.0]), tuple(source.homogeneous for source in mix) or (0.0,))
    out = [now]
    for change in cfg.data.phases:
        weights = now.weights if change.weights is None else tuple(change.weights)
        alone = now.homogeneous if change.homogeneous is None else tuple(change.homogeneous)
        now = Phase(change.step, change.batch or now.batch, weights, alone)
        out.append(now)
    return out


def build_stream(cfg: Recipe, objective: Objective, samples: list[Samples], ledger: Path | None = None) -> Stream:
    body, data, channels = objective.encoder(), cfg.data, cfg.model.in_channels  # type: ignore[attr-defined]
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != channels:
            raise ConfigError(f"data.{key} = {values}: model.in_channels = {channels}, so write {channels} values")
    views = type(objective).views(cfg.objective, body.image_size, body.patch_size)
    fetch = data.fetch
    reading = Reading(
        workers=default_workers() if data.workers is None else data.workers,
        threads=data.threads,
        ahead_mb=fetch.ahead_mb,
        requests=fetch.requests,
        attempt_seconds=fetch.attempt_seconds,
        retry_seconds=fetch.retry_seconds,
        stall_seconds=fetch.stall_seconds,
        cache=fetch.cache,
        cache_gb=fetch.cache_gb,
    )
    return Stream(
        samples,
        views,
        data.batch,
        cfg.seed,
        data.shuffle,
        accumulate=accumulation(cfg, objective.couples_batch),
        phases=phases_of(cfg, samples),
        look=Look(channels=channels, color=data.color),
        reading=reading,
        ledger=Ledger(ledger, share=data.bad_share, shard_share=data.bad_shard_share),
    )


class Log:
    """Lines for the person and for log.txt."""

    def __init__(self, run: Path):
        self.path = run / "log.txt"

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n")


def train(cfg: Recipe) -> Path:
    """Train a recipe to its end, or on from its last checkpoint; the run folder. Exits with code 75 when it was told to stop."""
    run = prepare(cfg)
    say, stop = Log(run), Stop()
    device = pick_device(cfg.device)
    if device.type == "cpu":
        torch.set_num_threads(cfg.threads or os.cpu_count() or 1)
        keep_freed_memory()
    samples = open_samples(cfg)
    for line in (settled := auto.settle(cfg, sum(map(len, samples)))):
        say(line)
    if settled:
        write_recipe(cfg, run)
    resumes = checkpoint.find(checkpoint.store_of(run, cfg), cfg.checkpoint.resume) is not None
    objective = build_objective(cfg, start=not resumes)
    stream = build_stream(cfg, objective, samples, run / "damaged")
    if cfg.precision == "auto":
        cfg.precision = _measure_precision(cfg, objective, stream, device)  # type: ignore[assignment]
        write_recipe(cfg, run)
    engine = Engine(objective, cfg, device)
    remember(samples, run / "data")
    guard = Guard(objective, cfg.skip, device)
    saver = checkpoint.Saver(run, cfg, say)
    step = _resume(run, saver, engine, stream, guard, say)
    if step >= cfg.steps and (run / "export" / str(cfg.steps)).is_dir():
        say(f"{run}: has finished its {cfg.steps} steps; overwrite=true starts it again")
        return run
    size = sum(p.numel() for p in objective.parameters() if p.requires_grad) / 1e6
    say(
        f"{run}: {cfg.objective.name} on {cfg.model.name} ({size:.1f} M parameters trained), {sum(map(len, samples))} samples, batch {cfg.data.batch},"
        f" {cfg.precision} on {device}, {torch.get_num_threads()} threads + {stream.workers} data workers"
    )
    writer = Writer(run, step, cfg.steps, cfg.log.every, stream)
    writer.readers.append(lambda rows: guard.read(rows, run, stream, say))
    writer.readers.append(collapse.Watch(vars(cfg.objective).get("prototypes"), say).read)
    gc.collect()
    gc.freeze()  # what is there by now stays
    gc.disable()  # the loop runs it at fixed steps
    try:
        step = _loop(cfg, run, step, engine, stream, writer, stop, say, guard, saver)
    finally:
        gc.enable()
        gc.unfreeze()
    writer.close()
    saver.close()
    stream.close()
    if stream.ledger.bad:
        say(
            f"{len(stream.ledger.bad)} damaged samples were replaced by their neighbours; all are named in {run / 'damaged'}"
        )
    if step < cfg.steps:
        say(f"{run}: stopped as asked, after a checkpoint; the same command goes on")
        sys.exit(STOPPED)
    return run


def _loop(
    cfg: Recipe,
    run: Path,
    first: int,
    engine: Engine,
    stream: Stream,
    writer: Writer,
    stop: Stop,
    say: Log,
    guard: Guard,
    saver: checkpoint.Saver,
) -> int:
    """Train from step `first`; the step that it ended at, which is `cfg.steps` unless it was told to stop."""
    objective, clock = engine.objective, writer.clock
    if first == 0:  # the untrained network: what every score is compared with
        export.save(run / "export" / "0", objective, cfg, step=0)
        _draw(cfg, run, 0, engine, stream, writer)
    for step in range(first, cfg.steps + 1):
        last = step == cfg.steps or stop.asked
        if last or every(step, cfg.checkpoint.every):
            writer.flush()
            saver.save(step, engine, stream, last=last, guard=guard.state_dict())
        if step == cfg.steps or every(step, cfg.export.every):
            export.save(run / "export" / str(step), objective, cfg, step)
            _draw(cfg, run, step, engine, stream, writer)
        if last:
            break
        saver.check()
        clock.lap("save")
        with timeouts.at_step(step):
            values = _step(cfg, step, engine, stream, guard, clock)
        for shard, key, reason in stream.ledger.new():
            say(f"damaged sample left out: {key} in {shard}: {reason}")
        if step == first:
            _refuse_unread(cfg)
            timeouts.shorten()
        if every(step, COLLECT):
            gc.collect()
        writer.add(step, **values)
        clock.lap("loop")
    return step


def _step(
    cfg: Recipe, step: int, engine: Engine, stream: Stream, guard: Guard, clock: Clock
) -> dict[str, Tensor | float]:
    """One step: forward and backward of its micro-batches, the update unless the guard skips it; what is to be logged, still on the device."""
    rows: list[dict[str, Tensor]] = []  # of the micro-batches
    guard.before()
    for micro in range(engine.accumulate):
        batch = next(stream)
        clock.lap("data")
        batch = to_device(batch, engine.device, cfg.data.mean, cfg.data.std)
        with engine.microbatch(last=micro + 1 == engine.accumulate):
            loss, logs = engine.forward(batch, step)
            engine.backward(loss)
        rows.append({"loss": loss.detach(), **logs})
        clock.lap("model")
    means = {key: torch.stack([row[key].float() for row in rows]).mean() for key in rows[0]}
    lr = cfg.optim.lr(step)
    thaw(engine.optimizer, step)
    norm = engine.step(lr, cfg.optim.weight_decay(step), lambda norm: guard.judge(means["loss"], norm))
    guard.after()
    engine.objective.after_step(step)
    clock.lap("model")
    return {**means, "grad_norm": norm, "lr": lr, "skipped": guard.skipped}


def _draw(cfg: Recipe, run: Path, step: int, engine: Engine, stream: Stream, writer: Writer) -> None:
    """The objective's pictures of the first batch of the run, always the same, so that one can see them change."""
    if type(engine.objective).pictures is Objective.pictures:
        return
    batch = to_device(stream.first(), engine.device, cfg.data.mean, cfg.data.std)
    for name, picture in engine.objective.pictures(batch).items():
        path = run / "pictures" / f"{name}-{step:09d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(path)
        writer.board.add_image(name, picture, step)


def _resume(run: Path, saver: checkpoint.Saver, engine: Engine, stream: Stream, guard: Guard, say: Log) -> int:
    found = checkpoint.find(saver.store, saver.cfg.resume)
    if found is None:
        return 0
    store, name = found
    step = checkpoint.load(store, name, engine, stream, guard=guard)
    say(f"{run}: goes on from step {step} ({store.path(name)})")
    return step


def _measure_precision(cfg: Recipe, objective: Objective, stream: Stream, device: torch.device) -> str:
    batch = to_device(stream.first(), device, cfg.data.mean, cfg.data.std)
    return faster_precision(objective.to(device), batch, device)


def _refuse_unread(cfg: Recipe) -> None:
    """A key that was set and that nothing has read by the end of the first step changes nothing: say so before hours are spent."""
    keys = [f"{key} = {value!r}" for key, value in config.unread(cfg) if not key.startswith(READ_LATER)]
    if keys:
        raise ConfigError(
            f"{cfg.run}/recipe.yaml: nothing reads {', '.join(keys)}: with the rest of this recipe it has no effect; take it out"
        )


def main() -> int:
    train(recipe.load(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
