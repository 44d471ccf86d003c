"""One process of a run in a Slurm job: `srun … python -m launch.slurm_rank FOLDER RECIPE` starts the trainer with the
environment of torch.distributed, and records in FOLDER on which node it runs and with which code it has ended
(`launch.rank_records`). This module does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from common.child_signals import STOP_SIGNALS, signals_blocked
from launch.rank_records import END, has_failed, record

POLL_SECONDS = 0.05  # time between two checks of the trainer


def distributed(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch.distributed reads, from those that Slurm sets for a task.

    MASTER_ADDR and MASTER_PORT come from the supervisor (`launch.supervisor`), which knows the nodes.
    """
    out = {"RANK": slurm["SLURM_PROCID"], "LOCAL_RANK": slurm["SLURM_LOCALID"]}
    tasks, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm["SLURM_STEP_NUM_NODES"])
    return {**out, "WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(tasks // nodes)}


def run(folder: Path, recipe: str) -> int:
    """Start the trainer, pass signals on to it, and return its exit code. After a failure this function does not
    return: the supervisor kills this process."""
    env = {"OMP_WAIT_POLICY": "passive", **os.environ, **distributed(os.environ)}
    about = {"rank": int(env["RANK"]), "node": env["SLURMD_NODENAME"], "step": env["SLURM_STEP_ID"]}
    with signals_blocked():  # a signal that comes now is delivered when the trainer can handle it
        trainer = subprocess.Popen([sys.executable, "-P", "-m", "pretrain.train", recipe], env=env)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: trainer.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    begun = recorded = False
    while True:
        code = trainer.poll()
        with contextlib.suppress(OSError):  # the disk is full: the next turn tries again
            if not begun:
                record(folder / f"rank-{about['rank']}.json", **about, pid=trainer.pid)
                begun = True
            if code is not None and not recorded:
                record(folder / f"rank-{about['rank']}{END}", **about, code=code, ended=time.time())
                recorded = True
        if code is not None and recorded and not has_failed(code):
            return code
        time.sleep(POLL_SECONDS)  # after a failure, until the supervisor kills this process


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2]))
