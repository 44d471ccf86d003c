"""One process of a run on Kubernetes, which torchrun starts: `python -m launch.pod_rank RECIPE` trains the recipe with two
differences to `pretrain.train`. A run that is trained but not completely scored counts as a success, because another pod
would only repeat that. And because torchrun also counts restarts after evictions, it is told to restart without limit:
this module ends the pod after too many restarts without a trained step between them. It does not import torch.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

from common.errors import run_main
from common.output import say
from launch.file_tails import last_step
from launch.rank_records import read_record, record
from pretrain.recipes.recipe import load
from pretrain.signals import EXIT_UNSCORED

MAX_RESTARTS = "UNLABELED_MAX_RESTARTS"  # variable: largest number of restarts in a row without a trained step
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # variable: how often this pod's torchrun has restarted the trainers


def in_a_row(done: int, restarts: int, path: Path) -> int:
    """The number of restarts in this pod since the run has last progressed. `done`: number of trained steps; `path`: of
    a file that lives as long as the pod."""
    known = read_record(path)
    if not known or done > known["done"]:
        record(path, done=done, restarts=restarts)
        return 0
    return restarts - known["restarts"]


def train() -> int:
    """Train, and return the exit code for torchrun. Does not return if the pod has to end."""
    limit, run = int(os.environ[MAX_RESTARTS]), Path(load(sys.argv[1]).run)
    if os.environ["LOCAL_RANK"] == "0":
        path = Path(tempfile.gettempdir()) / f"unlabeled-{os.getppid()}.json"
        done = last_step(run)
        if in_a_row(done, int(os.environ[RESTARTS]), path) > limit:
            say(
                f"{run}: more than {limit} restarts without a further step (max_restarts), so this pod ends at step {done}"
            )
            os.kill(os.getppid(), signal.SIGTERM)  # of torchrun, which then ends with an error
            time.sleep(3600)
    try:
        runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code != EXIT_UNSCORED:
            raise
        say(f"{run}: is trained, but not completely scored; `unlabeled eval {run}/export/STEP` computes the scores")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(train))
