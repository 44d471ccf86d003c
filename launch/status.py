"""What runs do at present: their place in the queue, steps, speed, checkpoints and scores, from the files of their
folders and from squeue. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, UserError
from common.output import columns
from common.progress import duration
from common.untrusted import loads, read_text
from common.yaml_values import read_yaml
from eval.results import MAIN_METRICS
from launch import slurm_client
from launch.run_tail import last_step, tail
from launch.slurm import job_of, queued
from launch.supervisor import STOP
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.run_folder.run_lock import living_holder, machine_id
from pretrain.run_folder.written_files import MARKER, RECIPE

HEAD = ("run", "state", "steps", "left", "samples/s", "MFU", "checkpoint", "last score", "restarts")
Queue = dict[Path, tuple[str, slurm_client.Queued]]


@dataclass(frozen=True)
class Status:
    """One run, in words; "-" for what is not known."""

    run: str
    state: str
    steps: str
    left: str
    speed: str
    mfu: str
    checkpoint: str
    score: str
    restarts: str

    @property
    def cells(self) -> list[str]:
        return list(vars(self).values())


def runs_in(folders: Sequence[str]) -> list[Path]:
    """The runs that these folders are or hold. Raises UserError for a folder that is and holds none."""
    out = []
    for folder in map(Path, folders):
        inside = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*") if _is_run(path))
        if not inside:
            raise UserError(f"{folder}: is no run folder and holds none; name one, or a folder of runs such as runs/")
        out += inside
    return out


def _is_run(folder: Path) -> bool:
    return (folder / MARKER).is_file() or (folder / RECIPE).is_file()


def table(runs: Sequence[Path]) -> list[str]:
    """A line for each run, under a line that names the columns."""
    notes, jobs = [], {}
    try:
        jobs = in_queue(runs)
    except UserError as error:  # on a machine without Slurm, the files can be read all the same
        notes = [f"note: what is in the queue is not known here; {error}"]
    rows = [of(run, jobs).cells for run in runs]
    return columns([list(HEAD), *rows], [16, 12, 12, 8, 10, 6, 11, 14]) + notes


def in_queue(runs: Sequence[Path]) -> Queue:
    """The runs whose job waits or runs, by squeue; none of them where there is no Slurm."""
    return queued([run.absolute() for run in runs]) if any(map(job_of, runs)) else {}


def of(run: Path, jobs: Queue) -> Status:
    """The status of one run."""
    done, job = last_step(run), job_of(run)
    try:
        recipe = read_yaml(run / RECIPE)
    except ConfigError:  # the run has not begun
        recipe = {}
    steps = recipe.get("steps", 0)
    held = _state_of(job)
    row = _last_with(run, "samples_per_second")
    speed = row.get("samples_per_second", 0.0)
    batch = (recipe.get("data") or {}).get("batch", 0)
    active = (run.absolute() in jobs) or living_holder(run) is not None
    left = duration((steps - done) * batch / speed) if active and speed and done < steps else "-"
    restarts, requeues = held.get("restarts", 0), held.get("attempts", 1) - held.get("restarts", 0) - 1
    saved = complete_checkpoints(run)
    return Status(
        str(run),
        _words(run, jobs, done, steps, held),
        f"{done}/{steps}" if steps else "-",
        left,
        f"{speed:.1f}" if speed else "-",
        f"{row['mfu']:.1%}" if "mfu" in row else "-",
        str(int(saved[-1].name)) if saved else "-",
        _score(run),
        (f"{restarts}" + (f" + {requeues} requeued" if requeues > 0 else "")) if job else "-",
    )


def _words(run: Path, jobs: Queue, done: int, steps: int, held: dict[str, Any]) -> str:
    """The state of a run: of its job, of the process that trains it, or how it ended."""
    if (pair := jobs.get(run.absolute())) is not None:
        name, job = pair
        why = f" ({job.reason})" if job.state != "RUNNING" and job.reason != "None" else ""
        where = f" on {job.nodes}" if job.nodes else ""
        return f"{job.state.lower()}{why}{where}, job {name}"
    if (holder := living_holder(run)) is not None:
        return f"running on {holder['host']}, process {holder['pid']}"
    if steps and done >= steps:
        return "finished"
    return held.get("ended") or ("stopped" if done else "not begun")


def _state_of(job: dict[str, Any]) -> dict[str, Any]:
    """state.json of a job's supervisor; {} without one."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(read_text(Path(job["folder"]) / str(job["number"]) / "state.json"))
    return {}


def _last_with(run: Path, key: str) -> dict[str, Any]:
    """The last row of metrics.jsonl that has a key: speeds are in the last row of each write only."""
    for line in reversed(tail(run / "metrics.jsonl", 1000)):
        with contextlib.suppress(ValueError):
            row = loads(line)
            if isinstance(row, dict) and isinstance(row.get(key), int | float):
                return row
    return {}


def _score(run: Path) -> str:
    """The last main score of results.jsonl, with its protocol and step."""
    for line in reversed(tail(run / "results.jsonl", 100)):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = loads(line)
            if row["metric"] in MAIN_METRICS and row["step"]:
                return f"{row['protocol']} {MAIN_METRICS[row['metric']].format(row['value'])} (step {row['step']})"
    return "-"


def stop(run: Path, now: bool) -> str:
    """Ask a run to stop after a checkpoint, or end it at once. Returns what was done. Raises UserError if nobody
    trains it, or a process of another machine does."""
    if (pair := in_queue([run]).get(run.absolute())) is not None:
        name, job = pair
        told = job_of(run)
        folder = Path(told["folder"]) / str(told["number"])
        folder.mkdir(exist_ok=True)
        (folder / STOP).touch()  # so that the job does not requeue itself
        if now or job.state != "RUNNING":
            slurm_client.ask("scancel", name)
            return f"{run}: job {name} is cancelled"
        slurm_client.ask("scancel", "--batch", "--signal=USR2", name)
        return f"{run}: job {name} ends after a checkpoint at the next step"
    holder = living_holder(run)
    if holder is None:
        raise UserError(f"{run}: nobody trains it at present, and it is in no queue")
    if holder["machine"] != machine_id():
        raise UserError(f"{run}: is trained by process {holder['pid']} on {holder['host']}; stop it there")
    try:
        os.kill(holder["pid"], signal.SIGKILL if now else signal.SIGTERM)
    except OSError as error:  # it belongs to another user, or has just ended
        raise UserError(f"{run}: process {holder['pid']} cannot be stopped ({error.strerror})") from None
    how = "is ended" if now else "ends after a checkpoint at the next step"
    return f"{run}: process {holder['pid']} {how}"


def log_of(run: Path, rank: int | None) -> Path:
    """The run's log, or that of one rank of its job. Raises UserError if there is none."""
    path = run / "log.txt"
    if rank is not None:
        job = job_of(run)
        folder = Path(job["folder"]) / str(job["number"]) if job else run
        path = folder / f"rank-{rank}.log"
        known = sorted(int(p.stem.rpartition("-")[2]) for p in folder.glob("rank-*.log"))
        if rank not in known:
            ranks = f"write --rank {known[0]} to {known[-1]}" if known else "only jobs of a cluster have logs of ranks"
            raise UserError(f"{run}: has no log of rank {rank}; {ranks}")
    if not path.is_file():
        raise UserError(f"{path}: is not there; the run has not begun")
    return path


def follow(path: Path, run: Path, say: Any, seconds: float = 0.5) -> None:
    """Hand each further line of a log to `say`, until the run has ended."""
    with path.open(errors="replace") as file:
        file.seek(0, 2)
        looked, active, rest = 0.0, True, ""
        while True:
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                say(line)
            if not active:
                return
            if time.monotonic() - looked > 10 * seconds:
                active, looked = is_active(run), time.monotonic()
            time.sleep(seconds)


def is_active(run: Path) -> bool:
    """Whether a run is in a queue, or a process trains it."""
    return bool(in_queue([run])) or living_holder(run) is not None
