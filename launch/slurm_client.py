"""Query Slurm with its own commands: the jobs in the queue and the partitions of the cluster. This module does not
import torch.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from common.errors import UserError

TIMEOUT = 60.0  # seconds that a command of Slurm may take
REPEAT_SECONDS = 300.0  # for which a request is repeated while Slurm's controller does not answer
REQUEUE_SECONDS = 120.0  # that Slurm has to end a job that is requeued
T = TypeVar("T")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING")
ACTIVE = ("RUNNING", "COMPLETING", *WAITING)  # states of jobs that run, wait, or will be started again


def ask(*command: str) -> str:
    """Run a command of Slurm and return its output. Raises UserError if it is not installed, fails or does not
    answer."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout
    except FileNotFoundError:
        problem = "is not installed here; use a machine from which jobs are submitted, such as a login node"
    except subprocess.TimeoutExpired:
        problem = f"did not answer in {TIMEOUT:g} s; Slurm's controller may be down, try again later"
    except subprocess.CalledProcessError as error:
        problem = f"failed: {' '.join(error.stderr.split()) or f'code {error.returncode}'}"
    raise UserError(f"{' '.join(command[:3])}: {problem}")


def repeated(request: Callable[[], T], say: Callable[[str], None]) -> T:
    """The result of a request to Slurm, which is repeated for REPEAT_SECONDS if it fails, because the controller may be
    restarting. Raises the UserError of the last request. `say` writes a line to a log."""
    deadline = time.monotonic() + REPEAT_SECONDS
    while True:
        try:
            return request()
        except UserError as error:
            if time.monotonic() > deadline:
                raise
            say(f"{error}; trying again")
            time.sleep(10.0)


@dataclass(frozen=True)
class Queued:
    """A job as squeue lists it."""

    state: str  # such as PENDING or RUNNING
    reason: str  # why it waits; "None" for a job that does not wait
    nodes: str  # in Slurm's notation, such as n[1-2]; "" for a job that waits
    began: str  # time at which it was started or is expected to start; "N/A" if Slurm does not know it


def jobs(ids: Iterable[str]) -> dict[str, Queued]:
    """{id: job} for those of the given jobs that Slurm still knows. A job of an array has the id ARRAY_INDEX."""
    wanted = [*dict.fromkeys(ids)]
    if not wanted:
        return {}
    listed = ",".join(sorted({name.partition("_")[0] for name in wanted}))
    words = ("--noheader", "--array", "--states=all", f"--jobs={listed}", "--format=%i|%T|%r|%N|%S")
    try:
        rows = [line.split("|") for line in ask("squeue", *words).splitlines()]
    except UserError as error:
        if "Invalid job id" in str(error):  # squeue's error if it no longer knows any of the jobs
            return {}
        raise
    return {row[0]: Queued(*row[1:5]) for row in rows if len(row) == 5 and row[0] in wanted}


def cluster_name() -> str:
    """The name of the cluster to which this machine belongs."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.M)
    return found[1] if found else "cluster"


def states_of(names: Iterable[str]) -> dict[str, list[Queued]]:
    """{name: this user's jobs of that name that Slurm still knows, [] if there are none}, for each of the names. They
    hold no comma and no |."""
    out: dict[str, list[Queued]] = {name: [] for name in names}
    if not out:
        return {}
    words = ("--noheader", "--me", "--states=all", f"--name={','.join(out)}", "--format=%i|%T|%r|%N|%S|%j")
    for row in (line.split("|") for line in ask("squeue", *words).splitlines()):
        if len(row) == 6 and row[5] in out:
            out[row[5]].append(Queued(*row[1:5]))
    return out


@dataclass(frozen=True)
class Partition:
    name: str
    default: bool
    nodes: int
    cpus: int  # smallest number of cores of a node
    memory_mb: int  # smallest memory of a node
    gpus: int  # smallest number of GPUs of a node
    hours: float | None  # time limit; None: no limit
    features: str

    def __str__(self) -> str:
        limit = "no limit" if self.hours is None else f"{self.hours:g} h"
        words = [f"{self.nodes} nodes", f"{self.cpus} cores", f"{self.memory_mb / 1024:.0f} GiB", f"{self.gpus} GPUs"]
        return f"{self.name}{' (default)' if self.default else ''}: {', '.join([*words, limit, self.features])}"


def partitions() -> list[Partition]:
    """The partitions of the cluster to which this machine belongs. Raises UserError if there are none."""
    rows = [line.split("|") for line in ask("sinfo", "--noheader", "--format=%P|%D|%c|%m|%G|%l|%f").splitlines()]
    out: dict[str, Partition] = {}
    for name, nodes, cpus, memory, gres, limit, features in (row for row in rows if len(row) == 7):
        gpus = _gpus(gres)
        smallest = (int(cpus.rstrip("+")), int(memory.rstrip("+")))
        line = Partition(name.rstrip("*"), name.endswith("*"), int(nodes), *smallest, gpus, _hours(limit), features)
        earlier = out.get(line.name)  # sinfo prints one line for each kind of node in a partition
        out[line.name] = line if earlier is None else _combine(earlier, line)
    if not out:
        raise UserError("sinfo: this cluster has no partition")
    return [*out.values()]


def cores_per_gpu(partition: str) -> float:
    """The smallest number of cores for each GPU of the nodes with GPUs in a partition; "": the default one. Raises
    UserError if it has no GPUs, or Slurm does not answer."""
    rows = [line.split("|") for line in ask("sinfo", "--noheader", "--format=%P|%c|%G").splitlines()]
    chosen = [
        row
        for row in rows
        if len(row) == 3 and (row[0].rstrip("*") == partition or (not partition and row[0][-1:] == "*"))
    ]
    shares = [int(cpus.rstrip("+")) / _gpus(gres) for _, cpus, gres in chosen if _gpus(gres)]
    if not shares:
        raise UserError(
            f"sinfo shows no GPUs in {f'the partition {partition}' if partition else 'the default partition'}"
        )
    return min(shares)


def _gpus(gres: str) -> int:
    """The number of GPUs in generic resources as sinfo writes them, such as gpu:h100:8(S:0-1)."""
    return sum(int(count) for count in re.findall(r"gpu:(?:[^:,(]+:)?(\d+)", gres))


def _combine(a: Partition, b: Partition) -> Partition:
    """Combine two lines of sinfo about the same partition, for different kinds of nodes."""
    smallest = (min(a.cpus, b.cpus), min(a.memory_mb, b.memory_mb), min(a.gpus, b.gpus))
    return Partition(a.name, a.default, a.nodes + b.nodes, *smallest, a.hours, f"{a.features}; {b.features}")


def _hours(limit: str) -> float | None:
    """The hours of a time limit that Slurm writes as [DAYS-]HOURS:MINUTES:SECONDS or MINUTES:SECONDS; None for any
    other text, such as "infinite"."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return round(days * 24 + hours + minutes / 60 + seconds / 3600, 2)
