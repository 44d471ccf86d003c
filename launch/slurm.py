"""Submit runs to a Slurm cluster, through submitit: `submit` checks everything, writes the job's folder, and queues it.

A job's folder, jobs/NAME-N beside the run folder, holds the resolved recipe of each of its runs (0.yaml, …), job.json,
the batch script, and later logs and records. The code is copied to jobs/code-HASH. RUN/job.json says which job trains
a run. The job itself is `launch.supervisor`; if the profile names one for evaluation jobs, `launch.evaluation_jobs`
is a second one. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import config
from common.child_signals import signals_blocked
from common.errors import ConfigError, UserError
from common.output import say
from common.yaml_values import parse_override
from eval import periodic_scoring
from launch import batch_script, clusters, code_snapshot, evaluation_jobs, evaluation_states, job_of_run, slurm_client
from launch.clusters import Cluster
from launch.local import provide
from launch.supervisor import check_world, hash_of, supervise
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.prepare import check_data, prepare, run_folder_lock
from pretrain.run_folder.written_files import RECIPE
from pretrain.trackers import trackers

JOBS = "jobs"  # the folder beside run folders that holds the folders of jobs
IN_PATHS = "%\\\n"  # characters that sbatch replaces in the names of files, or that end a line of a batch script


# ---------------------------------------------------------------- the runs of a job
def recipes(name: str, overrides: Sequence[str], array: Sequence[str]) -> list[Recipe]:
    """The recipe of each run: one, or one for each combination of the values in `array` ("seed=0,1,2"). Run folders are
    made absolute; in an array, their names end with the values, and so does `checkpoint.folder`, which each run needs for
    itself."""
    axes = [_values(entry) for entry in array]
    out = []
    for chosen in itertools.product(*axes):
        recipe = load(name, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in chosen)])
        suffixes = [f"{key.rpartition('.')[2]}-{str(value).replace('/', '-')}" for key, value in chosen]
        recipe.run = str(Path("_".join([str(Path(recipe.run)), *suffixes])).absolute())
        if recipe.checkpoint.folder and "checkpoint.folder" not in dict(chosen):
            recipe.checkpoint.folder = "_".join([recipe.checkpoint.folder.rstrip("/"), *suffixes])
        out.append(recipe)
    folders = [recipe.run for recipe in out]
    if repeated := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"--array: several runs would have the folder {repeated[0]}; give values that differ")
    return out


def _values(entry: str) -> list[tuple[str, Any]]:
    """[("seed", 0), ("seed", 1)] from "seed=0,1" or "seed=[0,1]"."""
    key, value = parse_override(entry)
    if isinstance(value, str) and "," in value:
        value = [parse_override(f"{key}={part}")[1] for part in value.split(",")]
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(one, dict | list) for one in values) or key == "run":
        raise UserError(f"--array {entry}: write KEY=VALUE,VALUE with single values, for example seed=0,1,2")
    if len(values) == 1:  # most likely an override that stands behind --array
        raise UserError(
            f"--array {entry}: has one value; write {entry} before --array, as an override, or several values"
        )
    return [(key, one) for one in values]


# ---------------------------------------------------------------- submission
def submit(runs: list[Recipe], cluster: Cluster, parallel_jobs: int = 0) -> list[str]:
    """Queue a job for these runs; several runs become an array. Returns the lines to print.

    A run that is already queued is not queued again. `parallel_jobs`: the number of jobs of an array that may run at
    the same time; 0: all.
    """
    _check(runs, cluster)
    evaluation = clusters.find(cluster.evaluation, "evaluation:") if cluster.evaluation else None
    if evaluation is not None:  # before anything is queued, as the watcher could not submit the jobs either
        batch_script.cores_per_node(evaluation_jobs.of_evaluation(evaluation))
    with batch_script.private_files(), _one_at_a_time(Path(runs[0].run).parent / JOBS):
        for recipe in runs:
            job_of_run.check_cluster(Path(recipe.run))
        already = job_of_run.in_queue([Path(recipe.run) for recipe in runs])
        lines = [
            f"{run}: is queued already, as job {name} ({one.state.lower()}{f', {one.reason}' if one.reason != 'None' else ''});"
            f" `unlabeled stop {run}` takes it back"
            for run, (name, one) in already.items()
        ]
        if new := [recipe for recipe in runs if Path(recipe.run) not in already]:
            lines += _submit(new, cluster, evaluation, parallel_jobs)
        for recipe in runs:
            evaluation_states.resume(Path(recipe.run))
        folders = {job_of_run.job_of(Path(recipe.run))["folder"] for recipe in runs}
        return lines + [line for folder in sorted(folders) for line in evaluation_jobs.submit_watcher(Path(folder))]


def _submit(new: list[Recipe], cluster: Cluster, evaluation: Cluster | None, parallel_jobs: int) -> list[str]:
    """`submit` for runs that are in no queue."""
    for recipe in new:
        provide(recipe)
        periodic_scoring.check(recipe)
        if not cluster.container:
            trackers.check(tracker.name for tracker in recipe.log.trackers)
        say(*recipe.derived)
    here = slurm_client.cluster_name()
    folder, jobs = _make_folder(new), list[str]()
    try:
        executor = _write_folder(new, folder, cluster, evaluation, parallel_jobs)
        with signals_blocked():  # also in sbatch: Ctrl-C counts once RUN/job.json says which job was queued
            jobs = batch_script.submit(executor, supervise, [str(folder)] * len(new), range(len(new)))
            for number, (recipe, name) in enumerate(zip(new, jobs, strict=True)):
                job_of_run.write_job(Path(recipe.run), folder, number, name, here)
    except UserError:  # nothing is queued, or a job of which nobody would know
        with contextlib.suppress(UserError):  # the first error counts
            if jobs:
                slurm_client.ask("scancel", *jobs)
        shutil.rmtree(folder)
        raise
    except BaseException:
        if not jobs:
            shutil.rmtree(folder)
        raise
    return [
        f"{recipe.run}: queued as job {name}; `unlabeled status {recipe.run}` says how it goes"
        for recipe, name in zip(new, jobs, strict=True)
    ]


def _write_folder(
    new: list[Recipe], folder: Path, cluster: Cluster, evaluation: Cluster | None, parallel_jobs: int
) -> Any:
    """Write a job's folder, and prepare the run folders. Returns the executor that submits the job."""
    code = code_snapshot.write(folder.parent)
    executor = batch_script.executor(Path(new[0].run).name, folder, code, cluster, parallel_jobs)
    if any(recipe.overwrite for recipe in new):  # before anything of the run is deleted
        batch_script.check(executor, len(new), folder)
    for number, recipe in enumerate(new):
        with run_folder_lock() as lock:  # no process trains in the folder, and it holds this run or no run
            run = prepare(recipe, lock)
            shutil.copyfile(run / RECIPE, folder / f"{number}.yaml")
    about = {"runs": [recipe.run for recipe in new], "cluster": config.to_dict(cluster)}
    about["methods"] = {recipe.objective.name: hash_of(recipe.objective.name) for recipe in new}
    about["evaluation"] = config.to_dict(evaluation) if evaluation is not None else None
    (folder / job_of_run.JOBS_FILE).write_text(json.dumps(about, indent=1) + "\n")
    return executor


def script(runs: list[Recipe], cluster: Cluster, parallel_jobs: int = 0) -> str:
    """The batch script that `submit` would submit."""
    _check(runs, cluster)
    folder = _folder(runs)
    code = folder.parent / f"code-{code_snapshot.code_hash()}"
    return batch_script.text(
        batch_script.executor(Path(runs[0].run).name, folder, code, cluster, parallel_jobs), len(runs)
    )


def _check(runs: list[Recipe], cluster: Cluster) -> None:
    """Raises UserError for a recipe that the job could not train."""
    for recipe in runs:
        if found := next((mark for mark in IN_PATHS if mark in recipe.run), ""):
            raise UserError(
                f"run = {recipe.run}: holds {found!r}, which sbatch replaces in names of files; write run=FOLDER"
            )
        if Path(recipe.run).name == JOBS:
            raise UserError(f"run = {recipe.run}: is where the folders of jobs are; write another run=FOLDER")
        check_data(recipe)
        smallest, largest = (count * cluster.processes_per_node for count in (cluster.min_nodes, cluster.max_nodes))
        try:
            check_world(recipe, largest)
        except ConfigError:  # from a range of nodes, the supervisor uses the largest number that divides the batch
            if smallest == largest:
                raise
            check_world(recipe, smallest)


# ---------------------------------------------------------------- the folders of jobs
@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other command submits jobs with folders in `folder`: it has to see what this one has queued."""
    _make(folder)
    try:
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise _no_folder(folder, error) from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder(runs: list[Recipe]) -> Path:
    """The folder of the next job: jobs/NAME-N, beside the run folder."""
    run = Path(runs[0].run)
    return next(path for n in itertools.count(1) if not (path := run.parent / JOBS / f"{run.name}-{n}").exists())


def _make_folder(runs: list[Recipe]) -> Path:
    """Create the folder of the next job."""
    folder = _folder(runs)
    _make(folder)
    return folder


def _make(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(folder, error) from None


def _no_folder(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written ({error.strerror}); choose another run folder with run=FOLDER")
