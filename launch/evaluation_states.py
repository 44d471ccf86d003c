"""What has become of the evaluation jobs of runs, from the records in RUN/evaluations/ (`launch.evaluation_jobs`), the
rows of results.jsonl and squeue. This module does not import torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from eval import results
from launch import job_of_run, slurm_client
from launch.due_evaluations import due, name_of
from launch.rank_records import END, read_record
from pretrain.recipes.recipe import stored
from pretrain.run_folder.written_files import CANCELLED, EVALUATION_RECORDS, EVALUATIONS, matches

WATCHER = "watch.json"  # file in the job's folder: the id of the watcher's job
MAX_NAMED = 6  # evaluations of one state that are listed
ORDER = ("failed", "running", "queued", "submitted", "waits for sbatch", "will be tried again")

Queue = Mapping[str, slurm_client.Queued] | None  # {id: job} for the jobs that Slurm knows; None if it cannot be asked


def record_files(run: Path, patterns: tuple[str, ...] = EVALUATION_RECORDS) -> list[Path]:
    """The files of a run's evaluations that match one of the patterns of `written_files`; other files there are the
    user's."""
    found = (run / EVALUATIONS).glob("*.json")
    return sorted(path for path in found if any(matches((EVALUATIONS, path.name), (*p.split("/"),)) for p in patterns))


@dataclass(frozen=True)
class Job:
    """The last job of one evaluation."""

    path: Path  # of its record
    record: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.record.get("id", ""))

    @property
    def evaluated(self) -> tuple[str, int, str]:
        """(name of the model, step, split)."""
        model, step, split = self.path.stem.rsplit("-", 2)
        return model, int(step), split

    def state(self, done: set[tuple[str, int, str]], queue: Queue) -> str:
        """ "done" or one of ORDER. `done`: the evaluations of which there are all rows."""
        end = read_record(self.path.with_name(f"{self.path.stem}{END}"))
        if self.evaluated in done or end.get("code") == 0:
            return "done"
        if self.record.get("failed"):
            return "failed"
        if not self.id:
            return "waits for sbatch"
        if queue is None:
            return "submitted"
        known = queue.get(self.id)
        if end.get("attempt") == self.record.get("attempt") or known is None or known.state not in slurm_client.ACTIVE:
            return "will be tried again"
        return "running" if known.state in ("RUNNING", "COMPLETING") else "queued"

    def __str__(self) -> str:
        model, step, split = self.evaluated
        name = "" if model in ("untrained", "pretrained") else f"{model} "
        reason = self.record.get("failed") or (f"job {self.id}" if self.id else "")
        return f"{name}step {step} on {split}" + (f" ({reason})" if reason else "")


def jobs_of(run: Path) -> list[Job]:
    """The evaluation jobs that were submitted for a run, in order of their steps."""
    found = [Job(path, read_record(path)) for path in record_files(run)]
    return sorted((job for job in found if job.record), key=lambda job: job.evaluated[1:])


def lines(runs: Sequence[Path]) -> list[str]:
    """A line for each run with evaluation jobs: how many are done, and which ones are in another state."""
    jobs = {run: found for run in runs if (found := jobs_of(run))}
    out = []
    for run, found in jobs.items():
        queue = _queue(run, found)
        done = {row[:3] for row in results.scored(run / "results.jsonl")}
        with contextlib.suppress(UserError):  # without a recipe only rows and records are known
            done -= {(name_of(model), step, split) for model, step, split in due(run, stored(run))}
        states: dict[str, list[Job]] = {}
        for job in found:
            states.setdefault(job.state(done, queue), []).append(job)
        finished = states.get("done", [])
        last = f", the last one of step {max(job.evaluated[1] for job in finished)}" if finished else ""
        parts = [f"{len(finished)} done{last}"]
        parts += [f"{state}: {_named(states[state])}" for state in ORDER if state in states]
        out.append(f"{run}: evaluation jobs: {'; '.join(parts)}")
    return out


def _queue(run: Path, jobs: Sequence[Job]) -> Queue:
    """The jobs that Slurm knows; None on a machine without Slurm, or of another cluster."""
    try:
        if job_of_run.job_of(run).get("cluster") == slurm_client.cluster_name():
            return slurm_client.jobs(job.id for job in jobs if job.id)
    except UserError:
        pass
    return None


def _named(jobs: Sequence[Job]) -> str:
    more = f" and {len(jobs) - MAX_NAMED} more" if len(jobs) > MAX_NAMED else ""
    return ", ".join(map(str, jobs[:MAX_NAMED])) + more


def cancel(run: Path) -> list[str]:
    """Cancel the jobs that evaluate a run's exports, and the watcher that submits them, unless it also watches another
    run that trains. A file says so to that watcher, which then submits no more until `resume`. Returns the ids of the
    jobs."""
    job = job_of_run.job_of(run)
    if job and read_record(Path(job["folder"]) / job_of_run.JOBS_FILE).get("evaluation"):
        (run / EVALUATIONS).mkdir(exist_ok=True)
        (run / EVALUATIONS / CANCELLED).touch()
    watcher = _watcher(run)
    if watcher:
        _cancel([watcher])
    return [*filter(None, [watcher]), *cancel_jobs(run)]


def cancel_jobs(run: Path) -> list[str]:
    """Cancel the jobs that evaluate a run's exports, and delete their records, so that the evaluations begin anew when
    the run is continued. Returns the ids of the jobs."""
    jobs = jobs_of(run)
    queue = slurm_client.jobs(job.id for job in jobs if job.id)
    active = [job for job in jobs if job.id in queue and queue[job.id].state in slurm_client.ACTIVE]
    if active:
        _cancel([job.id for job in active])
    for job in active:
        job.path.unlink(missing_ok=True)
    return [job.id for job in active]


def is_cancelled(run: Path) -> bool:
    """Whether the evaluations of a run are cancelled."""
    folder = run / EVALUATIONS
    return folder.is_dir() and CANCELLED in os.listdir(folder)  # looks at the disk anew, unlike `exists`


def resume(run: Path) -> None:
    """Let exports of a run be evaluated again."""
    (run / EVALUATIONS / CANCELLED).unlink(missing_ok=True)


def _cancel(ids: Sequence[str]) -> None:
    """Cancel jobs. Raises UserError if one of them goes on; scancel also fails for jobs that have just ended."""
    try:
        slurm_client.ask("scancel", *ids)
    except UserError:
        if any(job.state in ("RUNNING", *slurm_client.WAITING) for job in slurm_client.jobs(ids).values()):
            raise


def _watcher(run: Path) -> str:
    """The id of the job that watches this run and no other one that is in the queue; "" if there is none."""
    job = job_of_run.job_of(run)
    if not job:
        return ""
    folder = Path(job["folder"])
    name = str(read_record(folder / WATCHER).get("id", ""))
    known = slurm_client.jobs([name]).get(name) if name else None
    if known is None or known.state not in slurm_client.ACTIVE:
        return ""
    others = [Path(other) for other in job_of_run.read_folder(folder)["runs"] if Path(other) != run.resolve()]
    return "" if job_of_run.in_queue(others) else name
