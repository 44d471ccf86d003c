"""The batch scripts of jobs, by submitit, and the `srun` lines of their steps. This module does not import torch."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from launch import slurm_client
from launch.clusters import Cluster

OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")  # with which the variables begin that Slurm and submitit set


def executor(name: str, folder: Path, code: Path, cluster: Cluster, parallel_jobs: int = 0) -> Any:
    """A submitit executor with the parameters of the batch script of a job `name`, whose files are in `folder`.

    The script replaces its shell by the Python process (`exec`), so that this process receives Slurm's signal. Before
    that the script ignores the signal, which would end it. It starts other processes with `srun`. submitit's handling
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
        "job_name": name,
        "time": minutes,
        "nodes": cluster.max_nodes,
        # one task per node for sbatch, with the cores of all its processes: with --ntasks-per-node, Slurm 22.05 gives a
        # job of --nodes=1-2 one node, although two are free
        "cpus_per_task": cores_per_node(cluster),
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


def cores_per_node(cluster: Cluster) -> int:
    """The cores that a job gets on each node: those that the profile gives each process, or the share of a node's cores
    that belongs to its GPUs, by sinfo; of a job without GPUs, one for each process."""
    if cluster.cpus is not None or not cluster.gpus:
        return cluster.processes_per_node * (cluster.cpus or 1)
    try:
        share = slurm_client.cores_per_gpu(cluster.partition)
    except UserError as error:
        raise UserError(f"cpus is not given, and {error}; write --cpus N, the cores of each process") from None
    return max(1, math.floor(share * cluster.gpus))


def text(executor: Any, runs: int = 1) -> str:
    """The batch script of an executor, for an array of `runs` jobs if these are several."""
    if runs > 1:
        executor.parameters["map_count"] = runs
    try:
        return executor._make_submission_file_text(executor._submitit_command_str, "")
    finally:
        executor.parameters.pop("map_count", None)


def check(executor: Any, runs: int, folder: Path) -> None:
    """Ask Slurm whether it would accept a job, without queueing it. Raises UserError with its words if not."""
    path = folder / "check.sh"
    path.write_text(text(executor, runs))
    try:
        slurm_client.ask("sbatch", "--test-only", str(path))
    finally:
        path.unlink()


def submit(executor: Any, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[str]:
    """Queue calls of a function, of which `arguments` holds the first arguments, the second ones, …; an array if there
    are several. Returns the ids of the jobs. Raises UserError with sbatch's words."""
    try:
        with warnings.catch_warnings(action="ignore"), _outside_of_a_job():
            return [str(job.job_id) for job in executor.map_array(function, *arguments)]
    except Exception as error:  # submitit's exceptions, which quote sbatch
        raise UserError(f"sbatch refuses the job: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Create files that only their owner can change, whatever the umask: what a job executes is in its folder."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """If this process runs in a job, hide the environment variables of that job; a job that is submitted would inherit
    them."""
    inside = "SLURM_JOB_ID" in os.environ
    names = [name for name in os.environ if inside and name.startswith(OF_A_JOB) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def srun(cluster: Cluster, nodes: Sequence[str], per_node: int, cores: int) -> list[str]:
    """The words of an `srun` command for a step on these nodes, with `per_node` processes on each node and `cores`
    for each process.

    A step may overlap with an earlier one that Slurm still counts on a lost node. srun must not end the other ranks
    when one fails: the supervisor ends them, after they had time to write why they fail.
    """
    words = ["srun", "--overlap", "--unbuffered", "--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
    words += [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
    words += [
        f"--ntasks={len(nodes) * per_node}",
        f"--ntasks-per-node={per_node}",
        "--distribution=block",
        f"--cpus-per-task={cores}",
    ]
    words += [f"--container-image={cluster.container}"] if cluster.container else []
    words += [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
    return words


def python(cluster: Cluster) -> str:
    """The Python of a job's processes."""
    return cluster.python or ("python" if cluster.container else sys.executable)


def error_lines(stderr: str) -> str:
    """The last lines that a step has written to standard error, without those of srun if there are others: srun may
    write its own before or after them."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return "; ".join(([line for line in lines if not line.startswith("srun: ")] or lines)[-3:])


def cores_of_job() -> int:
    """The smallest number of cores that the job has on a node, from a text such as "96(x2),64"."""
    return min(int(part.partition("(")[0]) for part in os.environ["SLURM_JOB_CPUS_PER_NODE"].split(","))
