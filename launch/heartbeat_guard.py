"""Requeue a Slurm job whose supervisor is lost: `srun … python -m launch.heartbeat_guard HEARTBEAT RUN NUMBER` runs on a
node of the job other than the first one, from its start to its end (`launch.guards` starts it).

If the first node of a job is lost, the supervisor is lost with it, and Slurm keeps the job running on the other nodes,
also between two attempts, when no rank runs there. This module does not import torch.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from common.appended_lines import LineFile
from common.errors import UserError
from common.output import say
from launch import slurm_client
from launch.heartbeat import MISSED, PERIOD, Listener


def guard(heartbeat: Path, run_folder: Path, number: int) -> None:
    """Read the heartbeat, and requeue the job whenever it has ended. Slurm ends this process with the job. `number`: of
    this guard, from 0."""
    # the guards wait for different times, because one request is enough: Slurm then ends the others
    listener = Listener(heartbeat, MISSED + number)
    while True:
        if listener.is_lost():
            _requeue(os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"], run_folder)
        time.sleep(PERIOD / 10)


def _requeue(job: str, node: str, run_folder: Path) -> None:
    line = f"{node} requeues the job, because the heartbeat of the supervisor has ended: the first node was lost"
    say(line)
    LineFile(run_folder / "log.txt").add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} job {job}: {line}\n")
    try:
        slurm_client.ask("scontrol", "requeue", job)
    except UserError as error:  # the next call tries again
        say(str(error))


if __name__ == "__main__":
    guard(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
