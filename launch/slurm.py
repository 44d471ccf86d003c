"""Submit runs to a Slurm cluster, through submitit: `submit` checks everything, writes the job's folder, and queues it.

A job's folder, jobs/NAME-N beside the run folder, holds the resolved recipe of each of its runs (0.yaml, …), job.json,
the batch script, and later logs and records. The code is copied to jobs/code-HASH. RUN/job.json names the job that
trains a run. The job runs `launch.supervisor`. This module does not import torch.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import config
from common.errors import ConfigError, UserError
from common.untrusted import loads, read_text, schema_error
from common.yaml_values import parse_override
from data_pipeline.storage.urls import write_atomically
from launch import slurm_client, snapshot
from launch.clusters import Cluster
from launch.supervisor import check_world, hash_of, supervise
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.prepare import check_data, prepare, run_folder_lock
from pretrain.run_folder.written_files import JOB, RECIPE

SCHEMA = {"folder": str, "number": int, "id": str}  # of RUN/job.json


# ---------------------------------------------------------------- the runs of a job
def recipes(name: str, overrides: Sequence[str], array: Sequence[str]) -> list[Recipe]:
    """The recipe of each run: one, or one for each combination of the values in `array` ("seed=0,1,2"). Run folders are
    made absolute; in an array, their names end with the values."""
    axes = [_values(entry) for entry in array]
    out = []
    for chosen in itertools.product(*axes):
        recipe = load(name, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in chosen)])
        suffixes = [f"{key.rpartition('.')[2]}-{str(value).replace('/', '-')}" for key, value in chosen]
        recipe.run = str(Path("_".join([str(Path(recipe.run)), *suffixes])).absolute())
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
    return [(key, one) for one in values]


def job_of(run: Path) -> dict[str, Any]:
    """The content of RUN/job.json: {"folder": the job's folder, "number": number of the run in the job, "id": id in the
    output of squeue}; {} if there is none."""
    try:
        job = loads(read_text(run / JOB))
    except (OSError, ValueError):
        return {}
    return {} if schema_error(job, SCHEMA) else job


def queued(runs: Sequence[Path]) -> dict[Path, tuple[str, slurm_client.Queued]]:
    """{run: (id, job)} for the runs whose job waits or runs."""
    ids = {run: job["id"] for run in runs if (job := job_of(run))}
    found = slurm_client.jobs(ids.values())
    active = {run: (name, found[name]) for run, name in ids.items() if name in found}
    return {run: pair for run, pair in active.items() if pair[1].state in slurm_client.ACTIVE}


# ---------------------------------------------------------------- submission
def submit(runs: list[Recipe], cluster: Cluster, parallel_jobs: int = 0) -> list[str]:
    """Queue a job for these runs; several runs become an array. Returns the lines to print.

    A run that is already queued is not queued again. `parallel_jobs`: the number of jobs of an array that may run at
    the same time; 0: all.
    """
    _check(runs, cluster)
    already = queued([Path(recipe.run) for recipe in runs])
    lines = [
        f"{run}: is queued already, as job {name} ({one.state.lower()}{f', {one.reason}' if one.reason != 'None' else ''});"
        f" `unlabeled stop {run}` takes it back"
        for run, (name, one) in already.items()
    ]
    new = [recipe for recipe in runs if Path(recipe.run) not in already]
    if not new:
        return lines
    folder = _make_folder(new)
    try:
        jobs = _queue(new, folder, cluster, parallel_jobs)
    except BaseException:
        shutil.rmtree(folder)
        raise
    for number, (recipe, name) in enumerate(zip(new, jobs, strict=True)):
        job = {"folder": str(folder), "number": number, "id": name}
        write_atomically(str(Path(recipe.run) / JOB), [json.dumps(job).encode()])
        lines.append(f"{recipe.run}: queued as job {name}; `unlabeled status {recipe.run}` says how it goes")
    return lines


def _queue(new: list[Recipe], folder: Path, cluster: Cluster, parallel_jobs: int) -> list[str]:
    """Write the files of a job's folder and submit its batch script. Returns the id of each run's job."""
    for number, recipe in enumerate(new):
        with run_folder_lock() as lock:  # no process trains in the folder, and it holds this run or no run
            run = prepare(recipe, lock)
            shutil.copyfile(run / RECIPE, folder / f"{number}.yaml")
    job = {"runs": [recipe.run for recipe in new], "cluster": config.to_dict(cluster)}
    job["methods"] = {recipe.objective.name: hash_of(recipe.objective.name) for recipe in new}
    (folder / "job.json").write_text(json.dumps(job, indent=1) + "\n")
    code = snapshot.write(folder.parent)
    executor = _executor(new, folder, code, cluster, parallel_jobs)
    numbers = range(len(new))
    try:
        with warnings.catch_warnings(action="ignore"):
            jobs = executor.map_array(supervise, [str(folder)] * len(new), numbers)
    except Exception as error:  # submitit's exceptions, which quote sbatch
        raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from None
    return [str(job.job_id) for job in jobs]


def script(runs: list[Recipe], cluster: Cluster, parallel_jobs: int = 0) -> str:
    """The batch script that `submit` would submit."""
    _check(runs, cluster)
    folder = _folder(runs)
    executor = _executor(runs, folder, folder.parent / f"code-{snapshot.code_hash()}", cluster, parallel_jobs)
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _check(runs: list[Recipe], cluster: Cluster) -> None:
    """Raises UserError for a recipe that the job could not train."""
    for recipe in runs:
        check_data(recipe)
        smallest, largest = (count * cluster.processes_per_node for count in (cluster.min_nodes, cluster.max_nodes))
        try:
            check_world(recipe, largest)
        except ConfigError:  # from a range of nodes, the supervisor uses the largest number that divides the batch
            if smallest == largest:
                raise
            check_world(recipe, smallest)


def _folder(runs: list[Recipe]) -> Path:
    """The folder for a new job: jobs/NAME-N, beside the run folder."""
    run = Path(runs[0].run)
    return next(path for n in itertools.count(1) if not (path := run.parent / "jobs" / f"{run.name}-{n}").exists())


def _make_folder(runs: list[Recipe]) -> Path:
    """Create the folder for a new job, although other commands may do this at the same time."""
    while True:
        folder = _folder(runs)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.exists():  # one of the parents is a file
                raise UserError(
                    f"{folder.parent}: is not a folder; choose another run folder with run=FOLDER"
                ) from None
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); choose another run folder with run=FOLDER"
            ) from None


def _executor(runs: list[Recipe], folder: Path, code: Path, cluster: Cluster, parallel_jobs: int) -> Any:
    """A submitit executor with the parameters of the batch script.

    The script replaces its shell by the supervisor (`exec`), so that the supervisor gets Slurm's signal; until then the
    signal is ignored, because it would end the script. The supervisor starts the ranks with `srun`. submitit's handling
    of signals is not used: it requeues a job in the signal handler of rank 0, before the other ranks have saved, and
    only a limited number of times.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("submitit is missing: pip install 'unlabeled[slurm]'") from None

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # so that a script can be printed on a machine without Slurm

    executor = Executor(folder=str(folder), python=f"exec {shlex.quote(sys.executable)}")
    minutes = max(1, math.ceil(cluster.hours * 60))
    additional: dict[str, Any] = {"signal": f"B:USR2@{cluster.signal_delay}", "requeue": True, "no-kill": True}
    additional |= {"nodes": str(cluster.nodes)}
    additional |= {"mem": f"{math.ceil(cluster.memory_gb * 1024)}M"} if cluster.memory_gb else {}
    additional |= {"reservation": cluster.reservation} if cluster.reservation else {}
    for entry in cluster.sbatch:
        key, equals, value = entry.removeprefix("--").partition("=")
        additional[key] = value if equals else True
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"
    exports = [
        f"export {key}={shlex.quote(value)}" for key, _, value in (e.partition("=") for e in cluster.environment)
    ]
    given = {
        "job_name": Path(runs[0].run).name,
        "time": minutes,
        "nodes": cluster.max_nodes,
        # one task per node for sbatch, with the cores of all its processes: with --ntasks-per-node, Slurm 22.05 gives a
        # job of --nodes=1-2 one node, although two are free
        "cpus_per_task": cluster.processes_per_node * (cluster.cpus or 1),
        "gpus_per_node": cluster.gpus or None,
        "partition": cluster.partition or None,
        "qos": cluster.qos or None,
        "account": cluster.account or None,
        "constraint": cluster.constraint or None,
        "exclude": cluster.exclude or None,
        "setup": ["trap '' USR2", *cluster.setup, *exports, path],
        "use_srun": False,
        "stderr_to_stdout": True,
        "array_parallelism": parallel_jobs or 256,
        "additional_parameters": additional,
    }
    executor.update_parameters(**{key: value for key, value in given.items() if value is not None})
    executor.parameters["wckey"] = None  # clusters that check this key would refuse submitit's default
    return executor
