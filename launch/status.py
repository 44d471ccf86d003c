"""The state of runs: queue, steps, speed, checkpoints and scores, from the files in their folders and from squeue. This
module does not import torch."""

from __future__ import annotations

import contextlib
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
from common.untrusted import loads
from common.yaml_values import read_yaml
from data_pipeline.storage.urls import is_local
from launch import evaluation_states, slurm_client
from launch.file_tails import last_step, tail
from launch.job_of_run import Queue, check_cluster, folder_of, in_queue, is_active, job_of, state_of
from launch.supervisor import STOP
from pretrain.checkpoint.open_store import complete_checkpoints, open_checkpoint_store
from pretrain.interchange.run_facts import MAIN_METRICS
from pretrain.run_folder.run_lock import living_holder, machine_id
from pretrain.run_folder.written_files import MARKER, RECIPE

STORE_SECONDS = 10.0  # for which a request to a store is repeated
HEAD = ("run", "state", "steps", "left", "samples/s", "MFU", "checkpoint", "last score", "restarts")


@dataclass(frozen=True)
class Status:
    """The state of one run as text; "-" stands for unknown values."""

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


def runs_in(folders: Sequence[str]) -> list[Path | str]:
    """The run folders among `folders` and directly inside them, and the URLs of checkpoints. Raises UserError for a
    folder that is not a run folder and holds none."""
    out: list[Path | str] = []
    for name in folders:
        if not is_local(name):
            out.append(name)
            continue
        folder = Path(name.removeprefix("file://"))
        inside = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*") if _is_run(path))
        if not inside:
            raise UserError(f"{folder}: is no run folder and holds none; name one, or a folder of runs such as runs/")
        out += inside
    return out


def _is_run(folder: Path) -> bool:
    return (folder / MARKER).is_file() or (folder / RECIPE).is_file()


def table(runs: Sequence[Path | str]) -> list[str]:
    """A line with the names of the columns, a line for each run folder or URL, and a line for each run with evaluation
    jobs."""
    folders = [run for run in runs if isinstance(run, Path)]
    notes, jobs = [], {}
    try:
        jobs = in_queue(folders)
    except UserError as error:  # the files of the runs can be read even if Slurm cannot be queried
        notes = [f"note: the queue cannot be read here; {error}"]
    rows = [(of(run, jobs) if isinstance(run, Path) else of_checkpoints(run)).cells for run in runs]
    return columns([list(HEAD), *rows], [16, 12, 12, 8, 10, 6, 11, 14]) + evaluation_states.lines(folders) + notes


def of_checkpoints(url: str) -> Status:
    """The status of a run whose checkpoints are in a store: the newest of them says what is known there. Raises
    UserError if there is none."""
    store = open_checkpoint_store(url, STORE_SECONDS)
    names = store.complete_names()
    if not names:
        raise UserError(
            f"{url}: holds no checkpoint; a store has only the checkpoints of a run, so name its checkpoint.folder, or"
            " the run folder on the disk where it trains"
        )
    newest = store.run_json(names[-1])
    owner, steps, done = store.owner() or {}, newest["recipe"]["steps"], newest["step"]
    state = f"checkpoints of {owner.get('folder') or 'an unknown run'}"
    return Status(url, state, f"{done}/{steps}", "-", "-", "-", str(done), "-", "-")


def of(run: Path, jobs: Queue) -> Status:
    """The status of one run."""
    done, job = last_step(run), job_of(run)
    try:
        recipe = read_yaml(run / RECIPE)
    except ConfigError:  # the run has not begun
        recipe = {}
    steps = recipe.get("steps", 0)
    supervisor_state = state_of(job)
    row = _last_with(run, "samples_per_second")
    speed = row.get("samples_per_second", 0.0)
    batch = (recipe.get("data") or {}).get("batch", 0)
    if "samples" in row:  # of a batch by budget, whose number of samples varies: those of the last `log.every` steps
        batch = row["samples"] / recipe["log"]["every"]
    active = (run in jobs) or living_holder(run) is not None
    remaining = duration((steps - done) * batch / speed) if active and speed and done < steps else "-"
    restarts = supervisor_state.get("restarts", 0)
    requeues = supervisor_state.get("attempts", 1) - restarts - 1
    return Status(
        str(run),
        _describe_state(run, jobs, done, steps, supervisor_state),
        f"{done}/{steps}" if steps else "-",
        remaining,
        f"{speed:.1f}" if speed else "-",
        f"{row['mfu']:.1%}" if "mfu" in row else "-",
        _checkpoint(run, (recipe.get("checkpoint") or {}).get("folder") or ""),
        _score(run),
        (f"{restarts}" + (f" + {requeues} requeued" if requeues > 0 else "")) if job else "-",
    )


def _describe_state(run: Path, jobs: Queue, done: int, steps: int, supervisor_state: dict[str, Any]) -> str:
    """The state of the job of a run or of the process that trains it, or how the run ended."""
    if (pair := jobs.get(run)) is not None:
        name, job = pair
        reason = f" ({job.reason})" if job.state != "RUNNING" and job.reason != "None" else ""
        nodes = f" on {job.nodes}" if job.nodes else ""
        return f"{job.state.lower()}{reason}{nodes}, job {name}"
    if (holder := living_holder(run)) is not None:
        return f"running on {holder['host']}, process {holder['pid']}"
    if steps and done >= steps:
        return "finished"
    return supervisor_state.get("ended") or ("stopped" if done else "not begun")


def _checkpoint(run: Path, folder: str) -> str:
    """The step of the newest checkpoint, "-" without one. A store is not asked. `folder`: `checkpoint.folder`."""
    if not is_local(folder):
        return "in a store"
    saved = complete_checkpoints(run, folder)
    return str(int(saved[-1].name)) if saved else "-"


def _last_with(run: Path, key: str) -> dict[str, Any]:
    """The last row of metrics.jsonl that has a key. Only the last row of each write has the speeds."""
    for line in reversed(tail(run / "metrics.jsonl", 1000)):
        with contextlib.suppress(ValueError):
            row = loads(line)
            if isinstance(row, dict) and isinstance(row.get(key), int | float):
                return row
    return {}


def _score(run: Path) -> str:
    """The last main metric in results.jsonl, with its protocol and step; "-" if there is none."""
    for line in reversed(tail(run / "results.jsonl", 100)):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = loads(line)
            if row["metric"] in MAIN_METRICS and row["step"]:
                return f"{row['protocol']} {MAIN_METRICS[row['metric']].format(row['value'])} (step {row['step']})"
    return "-"


def stop(run: Path, now: bool) -> str:
    """Stop a run after a checkpoint or, with `now`, at once. Returns a line about it. Raises UserError if no process
    trains the run, or a process on another machine does."""
    if (pair := in_queue([run]).get(run)) is not None:
        name, job = pair
        folder = folder_of(job_of(run))
        folder.mkdir(exist_ok=True)
        (folder / STOP).touch()  # prevents that the job requeues itself
        if now or job.state not in ("RUNNING", "SUSPENDED"):
            slurm_client.ask("scancel", name)
            done = f"{run}: job {name} is cancelled"
            return f"{done}{_cancel_evaluations(run, done) if now else ''}"
        try:
            slurm_client.ask("scancel", "--batch", "--signal=USR2", name)
        except UserError as error:
            if job.state == "RUNNING":
                raise
            (folder / STOP).unlink(missing_ok=True)
            raise UserError(
                f"{run}: job {name} is suspended and cannot save a checkpoint ({error}); repeat the command when it"
                f" runs again, or cancel the job with --now"
            ) from None
        return f"{run}: job {name} ends after a checkpoint at the next step"
    check_cluster(run)
    holder = living_holder(run)
    if holder is None:
        done = f"{run}: its training has ended"
        if now and job_of(run) and (also := _cancel_evaluations(run, done)):
            return f"{done}{also}"
        raise UserError(f"{run}: no process trains it at present, and it is in no queue")
    if holder["machine"] != machine_id():
        raise UserError(f"{run}: is trained by process {holder['pid']} on {holder['host']}; stop it there")
    try:
        if now:
            _end_at_once(holder["pid"])
        else:
            os.kill(holder["pid"], signal.SIGTERM)
    except OSError as error:  # it belongs to another user, or has just ended
        raise UserError(f"{run}: process {holder['pid']} cannot be stopped ({error.strerror})") from None
    how = "is ended" if now else "ends after a checkpoint at the next step"
    return f"{run}: process {holder['pid']} {how}"


def _end_at_once(pid: int) -> None:
    """Kill a process that trains a run, and those that it has started to train and to score: trainers whose launcher was
    killed would write a checkpoint, and a scoring process would compute all scores that are due."""
    started = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parent = stat.read_bytes().rpartition(b")")[2].split()[1]
            words = stat.with_name("cmdline").read_bytes().split(b"\0")
            if int(parent) == pid and {b"pretrain.train", b"launch.watch"} & {*words}:
                started.append(int(stat.parent.name))
    os.kill(pid, signal.SIGKILL)  # first, so that it starts none of them again
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _cancel_evaluations(run: Path, done: str) -> str:
    """Cancel the evaluation jobs of a run. Returns the end of a line about it, "" if there are none. Raises UserError if
    they go on, which begins with what has been done."""
    try:
        ids = evaluation_states.cancel(run)
    except UserError as error:
        raise UserError(f"{done}, but not all of its evaluations ({error}); repeat the command") from None
    return f", and its evaluations: {'jobs' if len(ids) > 1 else 'job'} {', '.join(ids)}" if ids else ""


def log_of(run: Path, rank: int | None) -> Path:
    """The path of the run's log or, if a rank is given, of the log of that rank. Raises UserError if there is none."""
    path = run / "log.txt"
    if rank is not None:
        job = job_of(run)
        folder = folder_of(job) if job else run
        path = folder / f"rank-{rank}.log"
        known = sorted(int(p.stem.rpartition("-")[2]) for p in folder.glob("rank-*.log"))
        if rank not in known:
            ranks = f"write --rank {known[0]} to {known[-1]}" if known else "only jobs of a cluster have logs of ranks"
            raise UserError(f"{run}: has no log of rank {rank}; {ranks}")
    if not path.is_file():
        raise UserError(f"{path}: is not there; the run has not begun")
    return path


def follow(path: Path, run: Path, say: Any, seconds: float = 0.5) -> None:
    """Call `say` with each new line of a log, until the run has ended."""
    with path.open(errors="replace") as file:
        file.seek(0, os.SEEK_END)
        checked_at, active, incomplete_line = 0.0, True, ""
        while True:
            *lines, incomplete_line = (incomplete_line + file.read()).split("\n")
            for line in lines:
                say(line)
            if not active:
                return
            if time.monotonic() - checked_at > 10 * seconds:
                active, checked_at = is_active(run), time.monotonic()
            time.sleep(seconds)
