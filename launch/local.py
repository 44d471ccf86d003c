"""Run a recipe on this machine: the trainer as a process of its own, and beside it the process that scores its exports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from pretrain.recipe import Recipe
from pretrain.run_folder import prepare


def train(recipe: Recipe) -> int:
    """Start both, wait for both; the trainer's exit code. A signal goes to the trainer, which ends at the next step with a checkpoint."""
    run = prepare(recipe)
    evals = recipe.eval
    scoring = _python("launch.evals", run, stdin=subprocess.PIPE, nice=10) if evals.val or evals.test else None
    trainer = _python("pretrain.train", run)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: trainer.send_signal(number))
    code = trainer.wait()
    if scoring is not None and scoring.stdin is not None:
        if code:
            scoring.kill()
        scoring.stdin.close()  # no more exports will come: it ends when all are scored
        scoring.wait()
    return code


def _python(module: str, run: Path, stdin: int | None = None, nice: int = 0) -> subprocess.Popen:
    # OpenMP's threads wait for each other by spinning, which takes the core from the data workers and the scores that share the machine:
    # sleeping instead gave 285 samples/s where spinning gave 92 (the demo on two cores, one of them busy)
    return subprocess.Popen(
        [sys.executable, "-m", module, str(run)],
        env={"OMP_WAIT_POLICY": "passive", **os.environ},
        stdin=stdin,
        start_new_session=True,  # Ctrl-C reaches them once, through us
        preexec_fn=(lambda: os.nice(nice) and None) if nice else None,
    )
