"""Run a recipe on this machine: start one or more training processes, and a further process that scores the exports."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from common.child_signals import signals_blocked
from common.errors import UserError
from common.output import say
from eval.periodic_scoring import Scoring, check
from pretrain import image_folders
from pretrain.recipes import parallel_checks
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import prepare, run_folder_lock
from pretrain.run_folder.run_lock import LAUNCHER_VARIABLE, LOCK_TOKEN_VARIABLE
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED, STOPPED_EARLY, Stop, Stopped
from pretrain.trackers import trackers
from pretrain.trackers.tracking import Tracking

GRACE_SECONDS = 30.0  # time after the failure of one process in which the others may finish writing and end
DEMO_TEXT = Path("runs/demo-text")  # the token shards that the recipe gpt_demo names


def provide(recipe: Recipe) -> None:
    """Create the data that a recipe names if they do not exist yet: shards from folders of images, and the demo text.

    If the recipe trains on other text, the demo text is removed from the datasets of `eval`, because its tokenizer is
    another one.
    """
    image_folders.use_shards(recipe)
    data = recipe.data
    train = [Path(spec) for spec in (*data.train, *(shards for source in data.mix for shards in source.shards))]
    if train and not any(path.parent == DEMO_TEXT for path in train):
        _drop_demo_text(recipe, train[0])
    if any(path.parent == DEMO_TEXT and not path.exists() for path in train):
        from data_pipeline.build.demo_text import make

        make(DEMO_TEXT)


def _drop_demo_text(recipe: Recipe, train: Path) -> None:
    """Remove the demo text from the datasets of `eval`, and print a line about it."""
    changed = []
    for key, specs in recipe.eval.shard_lists().items():
        if any(Path(spec).parent == DEMO_TEXT for spec in specs):
            specs[:] = [spec for spec in specs if Path(spec).parent != DEMO_TEXT]
            changed.append(key)
    if changed:
        say(
            f"no scores on {' and '.join(f'eval.{key}' for key in changed)}: the recipe names the demo text there,"
            f" which was made with another tokenizer than {train}; for scores write"
            f" {' '.join(f'eval.{key}=TOKENS' for key in changed)}, made with --tokenizer {train}/tokenizer.json"
        )


def train(recipe: Recipe, processes: int = 1) -> int:
    """Start the training and the scoring processes, and wait for all of them.

    Returns the exit status of the training, or EXIT_UNSCORED if it has succeeded but scores are missing. A signal is
    passed on to the training processes, which write a checkpoint after the current step and end.
    """
    if processes < 1:
        raise UserError(f"--processes {processes}: write 1 or more")
    parallel_checks.check(recipe, processes)
    check(recipe)
    trackers.check(tracker.name for tracker in recipe.log.trackers)
    say(*recipe.derived)
    scoring = Scoring(recipe)
    with run_folder_lock() as lock, Stop() as stop, Tracking(recipe) as tracking:
        try:
            run = prepare(recipe, lock)
            stop.deferred = True  # from here on signals are passed on to the training processes
            scoring.start(run)
            tracking.start(run)
            # The training processes join the lock of this process, and end when this process ends.
            shared = {LOCK_TOKEN_VARIABLE: lock.token, LAUNCHER_VARIABLE: str(os.getpid())}
            trainers = [_start_module("pretrain.train", run, **shared, **ranks) for ranks in environments(processes)]
        except Stopped:
            tracking.ends_as(trackers.STOPPED)
            say(f"{recipe.run}: {STOPPED_EARLY}", file=sys.stderr)
            return EXIT_STOPPED

        def pass_on(number: int) -> None:
            for trainer in trainers:
                trainer.send_signal(number)

        stop.on_signal(pass_on)
        code = wait(trainers)
        if code:
            tracking.ends_as(trackers.STOPPED if code == EXIT_STOPPED else trackers.FAILED)
            scoring.kill()
            return code
        try:
            with stop.interruptible():
                problem = scoring.finish()
        except Stopped:
            tracking.ends_as(trackers.STOPPED)
            scoring.kill()
            return EXIT_STOPPED
    if problem:
        say(f"error: {problem}", file=sys.stderr)
    return EXIT_UNSCORED if problem else 0


def environments(processes: int) -> list[dict[str, str]]:
    """The environment variables of each process of a run on this machine (rank, number of processes, address), as
    torchrun sets them. A single process needs none."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]


def wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all processes. If one fails, end the others, which cannot continue without it.

    Returns the exit status of the process that failed first, or 0.
    """
    deadline, code = None, 0
    while any(p.poll() is None for p in processes):
        code = code or next((p.returncode for p in processes if p.returncode), 0)
        if code and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        time.sleep(0.02)
    code = code or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - code if code < 0 else code  # a process that a signal ended: the exit status of a shell


def _start_module(module: str, run: Path, **environment: str) -> subprocess.Popen:
    """Start `python -m MODULE RUN`."""
    # By default, OpenMP threads wait for each other in a busy loop, which takes CPU time from data workers and scoring.
    # With "passive" they sleep: on two cores, one of which was busy, the demo trained 285 instead of 92 samples/s.
    with signals_blocked():  # a signal that arrives now is delivered when the child can handle it
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(run)],  # -P: do not import modules from the current folder
            env={"OMP_WAIT_POLICY": "passive", **os.environ, **environment},
            start_new_session=True,  # so that Ctrl-C reaches the child only through this process
        )
