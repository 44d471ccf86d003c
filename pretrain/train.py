"""Trains a run. `python -m pretrain.train RECIPE [key=value …]` is one process of the run.

From Python: `train(load("demo", ["steps=100"]))`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain import signals

if __name__ == "__main__":
    signals.end_at_once()  # the imports below take seconds

import torch
from torch import Tensor

from common import config, output
from common.errors import ConfigError, UserError, run_main
from data_pipeline.stream.stream import Stream
from data_pipeline.stream.worker_processes import start_method, start_server
from pretrain import collapse_monitor, run_startup
from pretrain.build import build_stream, open_samples, placed
from pretrain.checkpoint.load import checkpoint_to_resume
from pretrain.checkpoint.save import Saver
from pretrain.loop_step import train_step
from pretrain.metrics import Writer
from pretrain.objectives import finder
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import processes, timeouts
from pretrain.parallel.blocks import GraphLog
from pretrain.parallel.device import keep_freed_memory, pick_device, threads
from pretrain.parallel.engine import Engine
from pretrain.parallel.modes import build_engine, check_engine
from pretrain.recipes import parallel_checks, recipe
from pretrain.recipes.recipe import Recipe
from pretrain.run_exports import missing_exports, write_exports
from pretrain.run_folder.checkpoint_owner import check_checkpoint_owner
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.prepare import prepare, run_folder_lock
from pretrain.run_folder.recipe_file import accept_recipe
from pretrain.run_folder.run_lock import LAUNCHER_VARIABLE, Lock, end_with_launcher
from pretrain.run_log import Log, data_summary, finished_line
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED, Stop, Stopped
from pretrain.trackers import trackers
from pretrain.trackers.tracking import Tracking
from pretrain.validation import held_out_batches

# prefixes of keys that may be read only after the first step, or by other processes
READ_LATER = ("eval.", "checkpoint.", "init.", "log.trackers")
GC_STEPS = 100  # steps between two garbage collections, which all ranks run at the same step, so that no rank waits


def train(cfg: Recipe) -> Path:
    """Train a recipe to its end, from its last checkpoint if there is one. Returns the run folder.

    A signal that stops the run ends it after a checkpoint: Ctrl-C raises KeyboardInterrupt, other signals raise
    SystemExit with code 75. Signal handlers are installed during the call, and only in the main thread. A second
    process scores the exports as the recipe's `eval` says; UserError is raised if scores are missing at the end. With
    several processes (torchrun, or `unlabeled train --processes N`) every process must call this function with the same
    recipe.
    """
    try:
        folder, problem = _train_and_score(cfg)
        if problem:
            raise UserError(problem)
        return folder
    except Stopped as stopped:
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        sys.exit(EXIT_STOPPED)


def _train_and_score(cfg: Recipe) -> tuple[Path, str]:
    """Train, and score in a second process. Returns (run folder, "" or why scores are missing)."""
    from eval import periodic_scoring  # a slow import, which only this process needs

    scorer = periodic_scoring.Scoring(cfg)

    def check() -> None:
        periodic_scoring.check(cfg)
        trackers.check(tracking.names)

    def start(folder: Path) -> None:
        scorer.start(folder)
        tracking.start(folder)

    with Tracking(cfg) as tracking:
        try:
            folder = _train_only(cfg, check, start)
            return folder, scorer.finish()
        except BaseException:
            scorer.kill()
            raise


def _train_only(
    cfg: Recipe,
    before_folder: Callable[[], None] = lambda: None,
    after_folder: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Like `train`, but without scores, and raises Stopped after a signal. Rank 0 calls `before_folder` before it
    creates the run folder, and `after_folder(folder)` afterwards."""
    parallel_checks.check(cfg, processes.world())
    with run_folder_lock() as lock, Stop() as stop:
        try:
            run_startup.convert_image_folders(cfg)
            device = processes.on_every_rank(lambda: pick_device(cfg.device, cfg.parallel.mode))
            if cfg.data.workers != 0 and start_method(cfg.data.start_method, device.type) == "forkserver":
                start_server(["pretrain.build"])  # before NCCL; early, so that it imports while this process continues
            processes.start(
                cfg.parallel.mode, device, retry=max(cfg.data.fetch.retry_seconds, cfg.checkpoint.retry_seconds)
            )
            return _train(cfg, device, stop, lock, before_folder, after_folder)
        except RuntimeError as error:
            # If a signal comes before the first step, the other ranks get it, too, and end, so that a collective fails.
            others_ended = not stop.deferred or (isinstance(error, timeouts.CollectiveError) and not stop.has_trained)
            if stop.number is None or not others_ended or processes.world() == 1:
                raise
            raise Stopped(stop.number) from None
        except Stopped:
            if not stop.deferred:
                output.say(f"{cfg.run}: {signals.STOPPED_EARLY}", file=sys.stderr)
            raise
        finally:
            processes.stop()


@dataclass
class Run:
    """The parts of a run that the training loop works with."""

    cfg: Recipe
    folder: Path
    engine: Engine
    stream: Stream
    guard: Guard  # skips steps
    saver: Saver
    writer: Writer
    stop: Stop
    say: Log
    held_out: list[dict[str, Tensor]]  # see `held_out_batches`


def _train(
    cfg: Recipe,
    device: torch.device,
    stop: Stop,
    lock: Lock,
    before_folder: Callable[[], None],
    after_folder: Callable[[Path], None],
) -> Path:
    """Train in this process, which has joined the process group. See `_train_only`."""
    processes.on_rank_0(before_folder)
    folder = processes.on_rank_0(lambda: prepare(cfg, lock))
    if processes.rank() == 0:
        after_folder(folder)
    # rank 0 has stored the recipe, with some of the "auto" values replaced
    cfg = processes.on_every_rank(lambda: recipe.load(folder) if processes.rank() else cfg)
    say = Log(folder)
    if device.type == "cpu":
        torch.set_num_threads(cfg.threads or threads(processes.local_world()))
        keep_freed_memory()
    samples = processes.on_every_rank(lambda: open_samples(cfg))
    run_startup.log_datasets(samples, say)
    run_startup.settle_auto_values(cfg, folder, samples, device, say)
    run_startup.log_normalisation(cfg, samples, say)
    processes.on_rank_0(lambda: check_checkpoint_owner(cfg, folder))
    found = checkpoint_to_resume(folder, cfg, say)
    objective = run_startup.build_and_log_objective(cfg, found is None, say)
    stream = processes.on_every_rank(lambda: build_stream(cfg, objective, samples, folder / "damaged", device))
    run_startup.check_plans(stream)
    run_startup.measure_precision(cfg, folder, objective, stream, device)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    processes.on_every_rank(lambda: check_engine(objective, cfg, device))
    engine = build_engine(objective, cfg, device)
    for line in engine.notes:
        say(line)
    run_startup.store_data_files(samples, objective, folder)
    guard = Guard(objective, cfg.skip, device)
    saver = Saver(folder, cfg, say)
    first = run_startup.resume(folder, found, saver, engine, stream, guard, say)
    if first >= cfg.steps and processes.on_rank_0(lambda: not missing_exports(folder, cfg.steps, engine)):
        say(
            f"{folder}: has finished its {cfg.steps} steps; overwrite=true starts it again; a larger steps=N continues"
            " it, if no schedule has begun to decay"
        )
        processes.on_rank_0(lambda: accept_recipe(folder))
        return folder
    say(
        f"{folder}: {cfg.objective.name} on {cfg.model.name} ({parameters / 1e6:.1f} M parameters trained),"
        f" {sum(map(len, samples))} samples, batch {cfg.data.batch_text},"
        f" {cfg.precision} on {engine.world} × {device.type} ({cfg.parallel.mode}),"
        f" {torch.get_num_threads()} threads + {stream.workers} data workers"
    )
    for line in stream.plan.lines():
        say(line)
    held_out = held_out_batches(cfg, objective, samples, engine, say)
    flops, peak = run_startup.flops_and_peak(cfg, folder, engine, say)
    writer = Writer(folder, first, cfg.steps, cfg.log.every, stream, device, flops, peak, samples[0].length)
    run = Run(cfg, folder, engine, stream, guard, saver, writer, stop, say, held_out)
    _add_readers(run, lock)
    try:
        with _collect_garbage_at_fixed_steps():
            end = _loop(run, first)
    finally:
        stream.close()
    _finish(run, first, end, samples[0].unit)
    return folder


def _add_readers(run: Run, lock: Lock) -> None:
    """Add the functions that get each row of metrics as soon as it is on the host: they report skipped steps, look for
    a collapse, and check that no other trainer has taken over the folder."""
    cfg, say = run.cfg, run.say
    classes, warmup = cfg.objective.assignments(), cfg.optim.lr.warmup_steps()
    metrics = run.folder / "metrics.jsonl"
    monitor = collapse_monitor.CollapseMonitor(classes, say, metrics, warmup, cfg.objective.remedies)
    run.writer.readers += [
        lambda rows: run.guard.read(rows, run.folder, run.stream, say),
        monitor.read,
        lambda rows: lock.check(),
    ]


@contextlib.contextmanager
def _collect_garbage_at_fixed_steps() -> Iterator[None]:
    """Context in which Python's automatic garbage collection is off; the loop collects garbage every GC_STEPS steps."""
    frozen_by_caller = gc.get_freeze_count() > 0
    gc.collect()
    if not frozen_by_caller:
        gc.freeze()  # the objects that exist now live as long as the run
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if not frozen_by_caller:
            gc.unfreeze()


def _is_due(step: int, steps: int) -> bool:
    """Whether a task that runs every `steps` steps is due at `step`. It is never due at step 0."""
    return step > 0 and step % steps == 0


def _loop(run: Run, first: int) -> int:
    """Train from step `first` on. Returns the number of trained steps: `cfg.steps`, or fewer after a signal."""
    cfg, stop, writer, clock = run.cfg, run.stop, run.writer, run.writer.clock
    agreement = processes.Agreement()
    graphs = GraphLog(run.say) if cfg.parallel.compile else None
    if first == 0:
        _export(run, 0)  # the untrained network, a baseline for the scores
    stop.deferred = True  # from now on a signal only sets `stop.number`, and the loop ends after a checkpoint
    for step in range(first, cfg.steps + 1):
        with timeouts.at_step(step):
            stopping = agreement.answer() if agreement.many else stop.number
            last = bool(stopping) or step == cfg.steps
            if last or _is_due(step, cfg.checkpoint.every):
                _save(run, step, last)
            if step == cfg.steps or _is_due(step, cfg.export.every):
                _export(run, step)
            if last:
                break
            run.saver.check()
            clock.lap("save")
            if step and step == cfg.optim.freeze_backbone:
                run.say(f"step {step}: the backbone is trained from here on")
            try:
                values = train_step(cfg, step, run.engine, run.stream, run.guard, clock, stop, agreement)
            except Stopped:  # a signal came while this rank waited for data; the weights are those of the previous step
                if agreement.many and not stop.has_trained:  # the other ranks stop, too, because their collectives fail
                    stop.deferred = False
                    raise
                run.guard.undo()
                run.stream.seek(step)
                _save(run, step, last=True)
                break
            if graphs is not None:
                graphs(step)
            for shard, key, reason in run.stream.damage_log.new():
                run.say(f"damaged sample left out: {key} in {shard}: {reason}", every_rank=True)
            if step == first:
                _accept_first_step(run)
            if _is_due(step, GC_STEPS):
                gc.collect()
            if run.held_out and (step + 1 == cfg.steps or _is_due(step + 1, cfg.log.val_every)):
                clock.lap("loop")
                batches = [placed(run.engine.objective, batch, run.engine.device) for batch in run.held_out]
                values["val_loss"] = run.engine.validate(batches, step)
                clock.lap("save")  # this part does not count for the training speed
            writer.add(step, **values)
            clock.lap("loop")
    return step


def _save(run: Run, step: int, last: bool) -> None:
    run.writer.flush()
    run.saver.save(step, run.engine, run.stream, last=last, guard=run.guard.state_dict())


def _export(run: Run, step: int) -> None:
    write_exports(run.cfg, run.folder, step, run.engine, run.stream, run.writer, run.say)


def _accept_first_step(run: Run) -> None:
    """After the first step: give collectives their short time-out, and make the recipe of this command the recipe of
    the run."""
    timeouts.shorten(parallel_checks.collective_timeout(run.cfg))
    processes.on_rank_0(lambda: _refuse_unread(run.cfg))
    processes.on_rank_0(lambda: accept_recipe(run.folder))
    run.stop.has_trained = True


def _refuse_unread(cfg: Recipe) -> None:
    """Raises ConfigError for keys that were set but not read until the end of the first step, so that they have no
    effect. All options that the objective's file names count as read, because a later step may read them."""
    config.count_as_read(cfg.objective, finder.attributes(cfg.objective.name))
    keys = [f"{key} = {value!r}" for key, value in config.unread(cfg) if not key.startswith(READ_LATER)]
    if keys:
        raise ConfigError(
            f"{cfg.run}/recipe.yaml: nothing reads {', '.join(keys)}; remove it,"
            " because it has no effect in this recipe"
        )


def _finish(run: Run, first: int, end: int, unit: str) -> None:
    """Write all pending rows and checkpoints, and log how the run has ended. Raises Stopped if it has not reached its
    last step, and UserError if rows of metrics could not be written. `unit`: the word for a sample, as in
    `data_summary`."""
    cfg, folder, say = run.cfg, run.folder, run.say
    problem = run.writer.close()
    run.saver.close()
    say(data_summary(folder, run.stream, first, end, unit))
    if end == cfg.steps and not problem:
        say(finished_line(cfg, folder, run.engine.objective))
    if processes.rank() == 0:
        rows = read_rows(folder / "metrics.jsonl")
        classes, warmup = cfg.objective.assignments(), cfg.optim.lr.warmup_steps()
        if verdict := collapse_monitor.verdict(rows, classes, warmup):
            say(f"{folder}: {verdict}; see `collapse` in {folder / 'log.txt'} for what to change")
    if end < cfg.steps:
        say(f"{folder}: stopped as asked, after a checkpoint; the same command resumes the run")
        raise Stopped(run.stop.number)
    if problem:
        raise UserError(problem)


def main() -> int:
    end_with_launcher()
    try:
        cfg = recipe.load(sys.argv[1], sys.argv[2:])
        if LAUNCHER_VARIABLE in os.environ:  # the launcher scores
            _train_only(cfg)
        elif problem := _train_and_score(cfg)[1]:
            output.say(f"error: {problem}", file=sys.stderr)
            return EXIT_UNSCORED
    except Stopped:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_STOPPED)  # without joining threads: one may wait for a store that does not answer
    except timeouts.CollectiveError as error:  # another rank failed: one line instead of a traceback
        output.say(f"error: {error}", file=sys.stderr)
        os._exit(1)  # without joining threads: an asynchronous save may wait for other ranks for much longer
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
