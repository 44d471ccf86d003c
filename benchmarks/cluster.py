"""How soon a run trains again after a fault, on a real Slurm cluster of two nodes on this machine (needs root, Debian):
four processes with gloo, two on each node. The model is tiny, so that the time is spent on detecting the fault,
checking nodes, importing torch, joining the process group and loading the checkpoint.

    launch.fault_to_step.kill.seconds   from kill -9 of a rank to the next step that is completed
    launch.fault_to_step.hang.seconds   from SIGSTOP of a rank, with parallel.timeout=10
    launch.fault_to_step.node.seconds   from the loss of a node, with nodes: 1-2
    launch.requeue_to_step.seconds      from `scontrol requeue` to the next step; 5 s of it are a delay of Slurm
    launch.lost_steps.kill              steps that are trained twice after kill -9, with checkpoint.every=10
    launch.lost_steps.signal            the same after `scontrol requeue`

Each figure is of one job.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.build.build_shards import build
from launch import slurm
from launch.clusters import Cluster
from launch.file_tails import last_step
from launch.job_of_run import job_of
from launch.rank_records import ranks_of
from pretrain.contract import VIT
from pretrain.recipes.recipe import load
from tests.slurm import SlurmCluster, missing

OPTIONS = [
    "steps=100000",
    "checkpoint=10",
    "export=100000",
    "data.batch=16",
    "data.workers=0",
    "log=1",
    "log.flops=false",
]
OPTIONS += ["parallel.mode=ddp", "parallel.timeout=10", "eval.pixels=false", "eval.image_size=null", "precision=fp32"]


def emit(name: str, value: float, unit: str) -> None:
    print(json.dumps({"name": f"launch.{name}", "value": round(value, 1), "unit": unit, "versus": None}), flush=True)


def make_shards(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(48):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{number}.jpg")
    build(folder, folder.parent / "shards")
    return folder.parent / "shards"


def measure(
    cluster: SlurmCluster, folder: Path, shards: Path, name: str, inject_fault: Callable[[str, Path], None]
) -> tuple[float, int]:
    """(seconds from a fault to the next completed step, steps that were trained twice)."""
    run = folder / name
    recipe = load("demo", [*VIT, *OPTIONS, "objective=mae", f"data.train={shards}", f"run={run}"])
    slurm.submit([recipe], Cluster(nodes="1-2", processes=2, cpus=1))
    job = job_of(run)
    log = run / "log.txt"
    cluster.wait(lambda: last_step(run) >= 25, "25 steps", 600)
    began = time.monotonic()
    inject_fault(job["id"], Path(job["folder"]) / "0" / "attempt-1")
    cluster.wait(lambda: "resumes from step" in log.read_text(), "it resumes", 600)
    text = log.read_text()
    start = int(re.findall(r"resumes from step (\d+)", text)[-1])
    # the last completed step, which the supervisor logs after a fault, and the trainer after a signal
    done = max(map(int, re.findall(r"(?:after|in the steps from \d+ to) (\d+)", text)))
    cluster.wait(lambda: last_step(run) > start, "a further step", 600)
    seconds = time.monotonic() - began
    cluster.run("scancel", job["id"])
    for node in cluster.nodes:
        if cluster.daemons[node].poll() is not None:
            cluster.start_node(node)
    cluster.wait_idle(120)
    return seconds, done - start


def main() -> None:
    if reason := missing():
        raise SystemExit(f"no Slurm here: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        shards = make_shards(folder / "images")
        with SlurmCluster(folder / "slurm") as cluster:
            os.environ |= {**cluster.environment, "OMP_NUM_THREADS": "1"}

            def send(number: signal.Signals) -> Callable[[str, Path], None]:
                return lambda job, attempt: os.kill(ranks_of(attempt)[1]["pid"], number)

            seconds, twice = measure(cluster, folder, shards, "kill", send(signal.SIGKILL))
            emit("fault_to_step.kill.seconds", seconds, "s")
            emit("lost_steps.kill", twice, "steps")
            emit("fault_to_step.hang.seconds", measure(cluster, folder, shards, "hang", send(signal.SIGSTOP))[0], "s")
            lose_node = lambda job, attempt: cluster.kill_node("n2")  # noqa: E731
            emit("fault_to_step.node.seconds", measure(cluster, folder, shards, "node", lose_node)[0], "s")
            requeue = lambda job, attempt: cluster.run("scontrol", "requeue", job) and None  # noqa: E731
            seconds, twice = measure(cluster, folder, shards, "requeue", requeue)
            emit("requeue_to_step.seconds", seconds, "s")
            emit("lost_steps.signal", twice, "steps")


if __name__ == "__main__":
    main()
