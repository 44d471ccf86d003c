"""Finds the job of a cluster that trains a run, from RUN/job.json and squeue. This module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.untrusted import loads, read_text, schema_error
from data_pipeline.storage.urls import write_atomically
from launch import slurm_client
from launch.rank_records import read_record
from pretrain.run_folder.run_lock import living_holder
from pretrain.run_folder.written_files import JOB

JOBS_FILE = "job.json"  # in a job's folder: its runs, their objectives, the profiles. Not RUN/job.json, which is JOB
SCHEMA = {"folder": str, "number": int, "id": str, "run": str, "cluster": str}  # of RUN/job.json
Queue = dict[Path, tuple[str, slurm_client.Queued]]  # {run: (id of its job, the job)}


def write_job(run: Path, folder: Path, number: int, name: str, cluster: str) -> None:
    """Write RUN/job.json. `folder`: the folder of the job; `number`: the number of the run in the job; `name`: the id
    of the job, as squeue shows it."""
    told = {"folder": str(folder), "number": number, "id": name, "run": str(run), "cluster": cluster}
    write_atomically(str(run / JOB), [json.dumps(told).encode()])


def read_folder(folder: Path) -> dict[str, Any]:
    """{"runs", "methods", "cluster", "evaluation"}: what `launch.slurm` has written into a job's folder. Raises UserError
    for another folder."""
    if not (job := read_record(folder / JOBS_FILE)):
        raise UserError(
            f"{folder / JOBS_FILE}: is missing or damaged; name the folder of a job, such as runs/jobs/NAME-1"
        )
    return job


def job_of(run: Path) -> dict[str, Any]:
    """RUN/job.json; {} without one, and in a copy of a run folder, whose job trains the original."""
    try:
        job = loads(read_text(run / JOB))
    except (OSError, ValueError):
        return {}
    return {} if schema_error(job, SCHEMA) or Path(job["run"]).resolve() != run.resolve() else job


def folder_of(job: dict[str, Any]) -> Path:
    """The folder with the records of a run's attempts, from its job.json."""
    return Path(job["folder"]) / str(job["number"])


def state_of(job: dict[str, Any]) -> dict[str, Any]:
    """state.json of a job's supervisor; {} without one."""
    return read_record(folder_of(job) / "state.json") if job else {}


def in_queue(runs: Sequence[Path]) -> Queue:
    """The runs whose job waits or runs, by squeue, without asking it if none has a job. A job of another cluster is in
    none of its lists."""
    found = {run: job for run in runs if (job := job_of(run))}
    here = slurm_client.cluster_name() if found else ""
    own = {run: job["id"] for run, job in found.items() if job["cluster"] == here}
    known = slurm_client.jobs(own.values())
    active = {run: (name, known[name]) for run, name in own.items() if name in known}
    return {run: pair for run, pair in active.items() if pair[1].state in slurm_client.ACTIVE}


def check_cluster(run: Path) -> None:
    """Raises UserError for a run whose job is one of another cluster and has not ended, as far as its files tell."""
    job = job_of(run)
    here = slurm_client.cluster_name() if job else ""
    if job and job["cluster"] != here and not state_of(job).get("ended"):
        raise UserError(
            f"{run}: is trained by job {job['id']} of the cluster {job['cluster']}, and this machine belongs to {here};"
            f" use a machine of {job['cluster']}, or delete {run / JOB} if that job is gone"
        )


def is_active(run: Path) -> bool:
    """Whether a run is in the queue, or a process trains it."""
    return bool(in_queue([run])) or living_holder(run) is not None
