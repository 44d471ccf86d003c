"""Clusters by name: what Slurm is asked for, from ~/.config/unlabeled/clusters.yaml and from options of the command
line. Nothing here imports torch.

    mycluster:
      partition: gpu
      nodes: 2-4
      gpus: 8
      hours: 24
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import build_config, config
from common.config import Section, option
from common.errors import ConfigError, nearest
from common.explain import explanations
from common.yaml_values import parse_yaml
from launch import slurm_client

NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass
class Cluster(Section):
    """What a job asks for, and what its batch script does before the training. Empty text, null and []: nothing."""

    nodes: int | str = 1  # of the job; a range such as 2-4 takes what there is, and goes on with what is left
    gpus: int = option(0, low=0)  # of each node; 0: the training runs on CPUs
    processes: int | None = option(None, low=1)  # of the training on each node; null: one per GPU, without GPUs one
    cpus: int | None = option(None, low=1)  # cores of each process
    memory_gb: float | None = option(None, above=0)  # of each node
    hours: float = option(24.0, above=0)  # time limit; a job that reaches it requeues itself and goes on
    signal_delay: int = option(120, low=1)  # seconds before the time limit at which the run saves and requeues
    max_restarts: int = option(3, low=0)  # in a row, without a further step between two of them
    partition: str = ""
    qos: str = ""  # quality of service
    account: str = ""  # that the time is charged to
    constraint: str = ""  # features that nodes must have
    reservation: str = ""
    exclude: str = ""  # nodes not to use, as in n[1-3],n7
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, as in "--mail-type=FAIL"
    setup: list[str] = field(default_factory=list)  # lines of the batch script, as in "module load cuda"
    environment: list[str] = field(default_factory=list)  # variables of the job, as in NCCL_DEBUG=WARN
    container: str = ""  # image in which the processes run (pyxis: srun --container-image)
    mounts: list[str] = field(default_factory=list)  # folders in the container, as in /data or /data:/mnt/data
    python: str = ""  # of the processes; empty: the one that submits. In a container: its own

    def check(self) -> None:
        most, least = self.most_nodes, self.least_nodes
        if not 1 <= least <= most:
            raise ValueError(f"nodes = {self.nodes!r}: write a number or a range of numbers, such as nodes: 2-4")
        for entry in self.environment:
            if not NAME.fullmatch(entry.partition("=")[0]) or "=" not in entry:
                raise ValueError(f"environment = {entry!r}: write NAME=VALUE")
        for entry in self.sbatch:
            if not re.match(r"--[a-z]", entry):
                raise ValueError(f"sbatch = {entry!r}: write --OPTION=VALUE or --OPTION")
        if self.mounts and not self.container:
            raise ValueError(
                f"mounts = {self.mounts}: there is no container; write container: IMAGE, or take mounts out"
            )

    @property
    def least_nodes(self) -> int:
        return _range(self.nodes)[0]

    @property
    def most_nodes(self) -> int:
        return _range(self.nodes)[1]

    @property
    def processes_per_node(self) -> int:
        return self.processes or max(1, self.gpus)


def _range(nodes: int | str) -> tuple[int, int]:
    """(least, most) of a number of nodes; (0, 0) for what is no such number."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(nodes))
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


# ---------------------------------------------------------------- the file of profiles
def file() -> Path:
    """clusters.yaml of this user."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "unlabeled" / "clusters.yaml"


def profiles() -> dict[str, dict[str, Any]]:
    """{name: options} of the user's file; {} without one."""
    path = file()
    found = (parse_yaml(path.read_text(), str(path)) if path.is_file() else None) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no mapping; write NAME: {{OPTION: VALUE}} for each cluster")
    for name, options in found.items():
        if not isinstance(options, dict):
            raise ConfigError(
                f"{path}: {name} = {options!r}: write the options of a cluster, such as {name}: {{gpus: 8}}"
            )
    return found


def find(name: str, **options: Any) -> Cluster:
    """The profile of that name with `options` laid over it, checked; None stands for an option that is not given.

    Without a name, the only profile there is, or, where there is none, what the options say.
    """
    known, path = profiles(), file()
    if not name and len(known) > 1:
        raise ConfigError(f"{path} has several clusters; name one with --on {', --on '.join(known)}")
    if name and name not in known:
        how = "`unlabeled launch --init` writes the profile of this machine's cluster"
        raise ConfigError(f"--on {name}: {path} has no such cluster; {nearest(name, known) if known else how}")
    name = name or next(iter(known), "")
    origin = {key: f"{path}: {name}" for key in known.get(name, {})}
    given = {key: value for key, value in options.items() if value is not None}
    origin |= dict.fromkeys(given, "command line")
    return build_config.build(Cluster, {**known.get(name, {}), **given}, origin or {"": "command line"})


# ---------------------------------------------------------------- unlabeled launch --init
def write_profile() -> str:
    """Ask `sinfo` for the partitions of this machine's cluster, and add a commented profile to the file. Returns what
    was written where. Raises UserError if there is no cluster, or the file has one of that name."""
    shown = slurm_client.ask("scontrol", "show", "config")
    named = re.search(r"^ClusterName\s*=\s*(\S+)", shown, re.M)
    name = named[1] if named else "cluster"
    path = file()
    if name in profiles():
        raise ConfigError(f"{path}: has the cluster {name} already; edit it there, or take it out and ask again")
    text = _profile(name, slurm_client.partitions())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(("\n" if out.tell() else "") + text)
    return f"{path}: has the cluster {name} now; look it over, then `unlabeled launch RECIPE key=value … --on {name}`"


def _profile(name: str, partitions: list[slurm_client.Partition]) -> str:
    """A profile for the default partition, or the first: what sinfo says, and the other options as comments."""
    chosen = next((one for one in partitions if one.default), partitions[0])
    lines = ["# partitions, by sinfo (nodes, cores and memory of each, GPUs, time limit, features):"]
    lines += [f"#   {one}" for one in partitions]
    share = chosen.cpus // max(1, chosen.gpus)
    set_here = {"partition": chosen.name, "nodes": 1, "gpus": chosen.gpus, "cpus": max(1, share)}
    set_here["hours"] = chosen.hours or 24.0
    lines.append(f"{name}:")
    meanings = explanations(Cluster)
    for key, value in set_here.items():
        lines.append(f"  {key}: {value}  # {meanings[key]}".rstrip(" #"))
    for key, item in config.fields(Cluster).items():
        if key not in set_here:
            value = item.default if item.default is not dataclasses.MISSING else []
            shown = {None: "null", "": '""'}.get(value, value) if not isinstance(value, list) else "[]"
            lines.append(f"  # {key}: {shown}  # {meanings[key]}".rstrip(" #"))
    return "\n".join(lines) + "\n"
