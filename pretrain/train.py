"""The one loop. `python -m pretrain.train RECIPE [key=value …]` trains, as one process of a run; from Python: `train(load("demo", ["steps=100"]))`."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.ledger import Ledger
from data_pipeline.plan import Phase
from data_pipeline.rows import Rows
from data_pipeline.shards import Look, remember
from data_pipeline.stream import Reading, Stream, default_workers, to_device
from data_pipeline.tokenizer import write_folder
from data_pipeline.vocabulary import TOKENIZER
from pretrain import auto, checkpoint, collapse, config, export, plan, recipe, weights
from pretrain.config import ConfigError
from pretrain.errors import command
from pretrain.guard import Guard
from pretrain.inputs import Dataset, check, open_samples, views
from pretrain.metrics import Clock, Writer
from pretrain.models import presets
from pretrain.models.layers import Backbone
from pretrain.objective import find
from pretrain.objectives.base import Objective
from pretrain.optim import thaw
from pretrain.parallel import engine as engines
from pretrain.parallel import processes, rules, timeouts
from pretrain.parallel.device import faster_precision, keep_freed_memory, pick_device
from pretrain.parallel.engine import Engine, accumulation
from pretrain.peak import peak
from pretrain.recipe import Recipe, is_text
from pretrain.run_folder import prepare, write_recipe
from pretrain.schedules import Schedule

STOPPED = 75  # exit code of a run that was told to stop and wrote its checkpoint: the same command goes on
READ_LATER = ("eval.", "checkpoint.", "init.")  # by the evaluation stage; by the first save; by a new run alone
COLLECT = 100  # steps between two runs of Python's garbage collector, on all processes at the same one: none waits for another's


class Stop:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 on any process: the loop ends at a step boundary, the same on all, with a checkpoint."""

    def __init__(self) -> None:
        self.mine = False
        self.agreement = processes.Agreement()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.mine = True

    def asked(self) -> bool:
        """All processes ask before each step."""
        return self.agreement.any(self.mine)


def every(step: int, steps: int) -> bool:
    return step > 0 and step % steps == 0


def build_objective(cfg: Recipe, start: bool = False, empty: bool = False) -> Objective:
    """The recipe's objective on CPU, with the weights that its seed gives; with `start`, also those that its `init` and its own options name.

    `empty`: without memory, for an engine that gets the weights from process 0.
    """
    auto.settle(cfg)  # where the data are not known, as for a plan
    torch.manual_seed(cfg.seed)
    start = start and not empty
    with (
        contextlib.nullcontext() if start else weights.unread(),
        torch.device("meta") if empty else contextlib.nullcontext(),
    ):
        try:
            kind = find(cfg.objective.name)
            check(cfg, kind)
            objective = kind(cfg.objective, lambda **changes: backbone(cfg, **changes))
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


def phases_of(cfg: Recipe, samples: Sequence[Dataset]) -> list[Phase]:
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


def build_stream(cfg: Recipe, objective: Objective, samples: Sequence[Dataset], ledger: Path | None = None) -> Stream:
    data = cfg.data
    fetch = data.fetch
    reading = Reading(
        workers=default_workers(processes.here()) if data.workers is None else data.workers,
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
        views(cfg, objective, samples),
        data.batch,
        cfg.seed,
        data.shuffle,
        rank=processes.rank(),
        world=processes.world(),
        accumulate=accumulation(cfg, objective.couples_batch, processes.world()),
        phases=phases_of(cfg, samples),
        look=_look(cfg),
        reading=reading,
        ledger=Ledger(ledger, processes.rank(), data.bad_share, data.bad_shard_share),
    )


def _look(cfg: Recipe) -> Look:
    if is_text(cfg):
        return Look(())
    data, channels = cfg.data, cfg.model.in_channels  # type: ignore[attr-defined]
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != channels:
            raise ConfigError(f"data.{key} = {values}: model.in_channels = {channels}, so write {channels} values")
    return Look(channels=channels, color=data.color)


def placed(cfg: Recipe, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on the device, images normalised as the recipe says."""
    return to_device(batch, device) if is_text(cfg) else to_device(batch, device, cfg.data.mean, cfg.data.std)


class Log:
    """Lines for the person and for log.txt, from process 0; what the others have to say of their own leads with their number."""

    def __init__(self, run: Path):
        self.path = run / "log.txt"

    def __call__(self, line: str, own: bool = False) -> None:
        if processes.rank():
            if not own:
                return
            line = f"process {processes.rank()}: {line}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n")


def train(cfg: Recipe) -> Path:
    """Train a recipe to its end, or on from its last checkpoint; the run folder. Exits with code 75 when it was told to stop.

    With several processes (torchrun, or `unlabeled train --processes N`) all of them call it with the same recipe.
    """
    rules.check(cfg, processes.world())
    device = processes.start(cfg.parallel.mode, pick_device(cfg.device))
    try:
        return _train(cfg, device)
    finally:
        processes.stop()


def _train(cfg: Recipe, device: torch.device) -> Path:
    run = processes.first(lambda: prepare(cfg))
    if processes.rank():
        cfg = recipe.load(run)  # as process 0 has settled and stored it
    say, stop = Log(run), Stop()
    if device.type == "cpu":
        torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // processes.here()))
        keep_freed_memory()
    samples = open_samples(cfg)
    for line in (settled := auto.settle(cfg, sum(map(len, samples)))):
        say(line)
    if settled:
        processes.first(lambda: write_recipe(cfg, run))
    resumes = processes.first(lambda: checkpoint.find(checkpoint.store_of(run, cfg), cfg.checkpoint.resume) is not None)
    objective = build_objective(cfg, start=not resumes, empty=engines.starts_empty(cfg))
    stream = build_stream(cfg, objective, samples, run / "damaged")
    if cfg.precision == "auto":
        cfg.precision = _measure_precision(cfg, objective, stream, device)  # type: ignore[assignment]
        processes.first(lambda: write_recipe(cfg, run))
    size = sum(p.numel() for p in objective.parameters() if p.requires_grad) / 1e6
    engine = engines.build(objective, cfg, device)
    processes.first(lambda: remember(samples, run / "data"))
    if isinstance(samples[0], Rows):
        vocabulary = samples[0].vocabulary
        processes.first(lambda: write_folder(str(run), vocabulary))  # goes into exports
    guard = Guard(objective, cfg.skip, device)
    saver = checkpoint.Saver(run, cfg, say)
    step = _resume(run, saver, engine, stream, guard, say)
    if step >= cfg.steps and processes.first(lambda: (run / "export" / str(cfg.steps)).is_dir()):
        say(f"{run}: has finished its {cfg.steps} steps; overwrite=true starts it again")
        return run
    say(
        f"{run}: {cfg.objective.name} on {cfg.model.name} ({size:.1f} M parameters trained), {sum(map(len, samples))} samples, batch {cfg.data.batch},"
        f" {cfg.precision} on {engine.world} × {device.type} ({cfg.parallel.mode}), {torch.get_num_threads()} threads + {stream.workers} data workers"
    )
    writer = Writer(run, step, cfg.steps, cfg.log.every, stream, device, *_flops(cfg, engine, say))
    writer.readers.append(lambda rows: guard.read(rows, run, stream, say))
    prototypes, warmup = vars(cfg.objective).get("prototypes"), cfg.optim.lr.warmup_steps()
    watch = collapse.Watch(prototypes, say, run / "metrics.jsonl", warmup)
    writer.readers.append(watch.read)
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


def _flops(cfg: Recipe, engine: Engine, say: Log) -> tuple[float, float]:
    """(FLOPs of a step, FLOP/s that all devices could reach); zeros where the objective cannot be planned."""
    if not cfg.log.flops:
        return 0.0, 0.0
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by copies of parameters
    try:
        return plan.trace(cfg).flops, engine.world * peak(engine.device, cfg.precision)
    except ConfigError as error:
        say(f"no FLOP/s will be logged: {error}")
        return 0.0, 0.0


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
    clock = writer.clock
    if first == 0:  # the untrained network: what every score is compared with
        _export(cfg, run, 0, engine, stream, writer)
    for step in range(first, cfg.steps + 1):
        with timeouts.at_step(step):
            last = stop.asked() or step == cfg.steps
            if last or every(step, cfg.checkpoint.every):
                writer.flush()
                saver.save(step, engine, stream, last=last, guard=guard.state_dict())
            if step == cfg.steps or every(step, cfg.export.every):
                _export(cfg, run, step, engine, stream, writer)
            if last:
                break
            saver.check()
            clock.lap("save")
            values = _step(cfg, step, engine, stream, guard, clock)
            for shard, key, reason in stream.ledger.new():
                say(f"damaged sample left out: {key} in {shard}: {reason}", own=True)
            if step == first:
                timeouts.shorten(cfg.parallel.timeout)
                processes.first(lambda: _refuse_unread(cfg))
            if every(step, COLLECT):
                gc.collect()
            writer.add(step, **values)
            clock.lap("loop")
    stop.agreement.settle()
    return step


def _step(
    cfg: Recipe, step: int, engine: Engine, stream: Stream, guard: Guard, clock: Clock
) -> dict[str, Tensor | float]:
    """One step: forward and backward of its micro-batches, the update unless the guard skips it; what is to be logged, still on the device."""
    rows: list[dict[str, Tensor]] = []  # of the micro-batches
    guard.before()

    def fetched() -> Iterator[dict[str, Tensor]]:
        for _ in range(engine.accumulate):
            batch = next(stream)
            clock.lap("data")
            yield placed(cfg, batch, engine.device)

    for micro, batch in enumerate(engine.micro_batches(fetched())):
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


def _export(cfg: Recipe, run: Path, step: int, engine: Engine, stream: Stream, writer: Writer) -> None:
    """The encoder as a folder, and the objective's pictures of the first batch of the run, always the same, so that one can see them change."""
    folder = run / "export" / str(step)
    if not processes.first(lambda: (folder / "config.json").is_file()):
        states = engine.encoder_states()
        tokenizer = run / TOKENIZER if is_text(cfg) else None
        processes.first(lambda: export.save(folder, engine.objective, cfg, step, states, tokenizer))
    if type(engine.objective).pictures is Objective.pictures:
        return
    batch = placed(cfg, stream.first(), engine.device)
    pictures = engine.pictures(batch)
    for name, picture in pictures.items() if writer.writes else ():
        path = run / "pictures" / f"{name}-{step:09d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(path)
        writer.board.add_image(name, picture, step)


def _resume(run: Path, saver: checkpoint.Saver, engine: Engine, stream: Stream, guard: Guard, say: Log) -> int:
    found = checkpoint.find_for_all(saver.store, saver.cfg.resume)
    if found is None:
        return 0
    store, name = found
    step = checkpoint.load(store, name, engine, stream, guard=guard)
    say(f"{run}: goes on from step {step} ({store.path(name)})")
    before = config.build(Schedule, store.about(name)["recipe"]["optim"]["lr"], {"": store.path(name)})(step)
    now = saver.recipe.optim.lr(step)
    if not math.isclose(now, before, rel_tol=1e-6):  # a decay that branches off belongs before any other has begun
        say(f"optim.lr is {now:.4g} at step {step}; where the checkpoint comes from, it is {before:.4g}")
    return step


def _measure_precision(cfg: Recipe, objective: Objective, stream: Stream, device: torch.device) -> str:
    batch = placed(cfg, stream.first(), device)
    mine = faster_precision(objective.to(device), batch, device)  # all measure: the loss may need all
    return processes.first(lambda: mine)


def _refuse_unread(cfg: Recipe) -> None:
    """A key that was set and that nothing has read by the end of the first step changes nothing: say so before hours are spent."""
    keys = [f"{key} = {value!r}" for key, value in config.unread(cfg) if not key.startswith(READ_LATER)]
    if keys:
        raise ConfigError(
            f"{cfg.run}/recipe.yaml: nothing reads {', '.join(keys)}: with the rest of this recipe it has no effect; take it out"
        )


def main() -> int:
    try:
        train(recipe.load(sys.argv[1], sys.argv[2:]))
    except timeouts.CollectiveError as error:  # not this process's fault: a line, and no stack
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # a save beside the training may wait for the others for much longer
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
