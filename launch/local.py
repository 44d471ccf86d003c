"""Run a recipe on this machine: the trainer as one or more processes of their own, and beside it the process that scores its exports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pretrain.errors import UserError
from pretrain.parallel import rules
from pretrain.recipe import Recipe
from pretrain.run_folder import prepare

PATIENCE = 30.0  # seconds that the others have to end by themselves when one has failed: they may be writing
DEMO_TEXT = Path("runs/demo-text")  # gpt_demo names the token sets in it


def provide(recipe: Recipe) -> None:
    """Make the demo text where a recipe names it and it is not there."""
    data = recipe.data
    named = [Path(spec) for spec in (*data.train, *(shards for source in data.mix for shards in source.shards))]
    if any(path.parent == DEMO_TEXT and not path.exists() for path in named):
        from data_pipeline.demo_text import make

        make(DEMO_TEXT)


def train(recipe: Recipe, processes: int = 1) -> int:
    """Start both, wait for both; the trainer's exit code. A signal goes to the trainer, which ends at the next step with a checkpoint."""
    if processes < 1:
        raise UserError(f"--processes {processes}: write 1 or more")
    rules.check(recipe, processes)
    print(*recipe.derived, sep="\n", end="\n" * bool(recipe.derived), flush=True)
    run = prepare(recipe)
    evals = recipe.eval
    scoring = _python("launch.evals", run, stdin=subprocess.PIPE, nice=10) if evals.val or evals.test else None
    trainers = [_python("pretrain.train", run, **extra) for extra in environments(processes)]

    def pass_on(number: int, frame: object) -> None:
        for trainer in trainers:
            trainer.send_signal(number)

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, pass_on)
    code = wait(trainers)
    if scoring is not None and scoring.stdin is not None:
        if code:
            scoring.kill()
        scoring.stdin.close()  # no more exports will come: it ends when all are scored
        scoring.wait()
    return code


def environments(processes: int) -> list[dict[str, str]]:
    """What tells each of a run's processes on this machine who it is; nothing for a single one."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]


def wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all; the exit code of the first that failed, where one did: the others cannot go on without it and are ended."""
    deadline, code = None, 0
    while any(p.poll() is None for p in processes):
        code = code or next((p.returncode for p in processes if p.returncode), 0)
        if code and deadline is None:
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        time.sleep(0.02)
    code = code or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - code if code < 0 else code  # of a signal, as a shell has it


def _python(module: str, run: Path, stdin: int | None = None, nice: int = 0, **environment: str) -> subprocess.Popen:
    # OpenMP's threads wait for each other by spinning, which takes the core from the data workers and the scores that share the machine:
    # sleeping instead gave 285 samples/s where spinning gave 92 (the demo on two cores, one of them busy)
    return subprocess.Popen(
        [sys.executable, "-m", module, str(run)],
        env={"OMP_WAIT_POLICY": "passive", **os.environ, **environment},
        stdin=stdin,
        start_new_session=True,  # Ctrl-C reaches them once, through us
        preexec_fn=(lambda: os.nice(nice) and None) if nice else None,
    )
