"""RUN/.run.json, the marker of a run folder: the id of the run, and the files that the program may delete."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.untrusted import loads, schema_error
from pretrain.run_folder.recipe_file import stored_checkpoint_folder
from pretrain.run_folder.run_lock import process_start
from pretrain.run_folder.written_files import MARKER, RECIPE, RUN_FILES, write_atomically

MAX_JOBS = 20  # largest number of names of jobs in a marker
SCHEMA = {"id": str, "writes": [str], "?old": str, "?clearing": str, "?resumed": str, "?launches": [str], "?saved": str}
JSON_NAMES = {  # {field of `Marker`: its name in the file}
    **{"id": "id", "files": "writes", "checkpoints_without_id": "old", "deleting_id": "clearing"},
    **{"resumed_from": "resumed", "jobs": "launches", "saved_in": "saved"},
}


@dataclass(frozen=True)
class Marker:
    """The content of a marker. Entries that are None are not written."""

    id: str  # of the run; each of its checkpoints stores it, too
    files: list[str]  # patterns of the files that the program has written, see written_files.py
    # `checkpoint.folder` of a run that began in a version without ids, so that its checkpoints store none
    checkpoints_without_id: str | None = None
    deleting_id: str | None = None  # the former id of the run, while overwrite=true deletes it
    # the value of `checkpoint.resume` with which the run began; set when the run has saved a checkpoint, so that the
    # same command then resumes from the run's own checkpoints
    resumed_from: str | None = None
    jobs: list[str] | None = None  # names of the jobs that have trained the run, see `job_names`
    # the folder in which the run has last saved a checkpoint, as an absolute path or a URL
    saved_in: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Marker:
        return cls(**{field: values[name] for field, name in JSON_NAMES.items() if name in values})

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, field) for field, name in JSON_NAMES.items()}
        return {name: value for name, value in values.items() if value is not None}


def read_marker(run: Path) -> Marker:
    """The marker of a run folder; a folder without one gets a marker with a new id. Raises UserError if the marker is
    damaged."""
    path = run / MARKER
    if not path.is_file():
        # a run of a version without ids
        folder = stored_checkpoint_folder(run / RECIPE) if (run / RECIPE).is_file() else None
        marker = Marker(uuid.uuid4().hex, list(RUN_FILES), folder)
        _write_marker(run, marker)
        return marker
    try:
        values = loads(path.read_text())
        if not schema_error(values, SCHEMA):
            return Marker.from_json(values)
    except ValueError:
        pass
    raise UserError(
        f"{path}: is damaged or was not written by this program; choose another folder with run=FOLDER, or delete this"
        " file if the folder is a run"
    )


def holds_run(folder: Path, run_id: str) -> bool:
    """Whether a folder is that of the run with this id. Reads only, unlike `read_marker`."""
    try:
        return bool(loads((folder / MARKER).read_text())["id"] == run_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def update_marker(run: Path, **changes: Any) -> Marker:
    """Replace fields of the marker; None removes an entry. Returns the new marker."""
    marker = dataclasses.replace(read_marker(run), **{"files": list(RUN_FILES), **changes})
    _write_marker(run, marker)
    return marker


def _write_marker(run: Path, marker: Marker) -> None:
    write_atomically(run / MARKER, json.dumps(marker.to_json(), indent=1) + "\n")


def run_identity(run: Path) -> dict[str, str]:
    """{"id", "folder"}: the entry for its run in each checkpoint. Error messages name the folder."""
    return {"id": read_marker(run).id, "folder": str(run.resolve())}


# ---------------------------------------------------------------- jobs that are restarted
def job_names() -> list[str]:
    """Names of the job that this process belongs to, one for each system that may restart the same command: torchrun
    and Slurm."""
    names = []
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        if run_id == "none":  # torchrun's default, which does not identify the job
            parent = os.getppid()
            run_id = f"{os.uname().nodename} {parent} {process_start(parent)}"
        names.append(f"torchrun {run_id}")
    if job := os.environ.get("SLURM_JOB_ID"):
        names.append(f"slurm {job}")
    return names


def is_restart(marker: Marker) -> bool:
    """Whether torchrun or Slurm has restarted this command in the job that began the run, so that `overwrite=true` must
    not delete the run again."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
        return True
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    jobs = [job for job in job_names() if requeued or job.startswith("torchrun")]
    return any(job in (marker.jobs or []) for job in jobs)


def remember_job(run: Path, marker: Marker) -> None:
    """Add the names of this process's job to the marker."""
    known = marker.jobs or []
    if new := [job for job in job_names() if job not in known]:
        update_marker(run, jobs=[*known, *new][-MAX_JOBS:])
