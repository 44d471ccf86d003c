"""Profiles of clusters: the resources that a job requests from Slurm, from ~/.config/unlabeled/clusters.yaml and from
options of the command line. This module does not import torch.

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

from common import build_config, config, output
from common.config import Section, option
from common.errors import ConfigError, nearest
from common.explain import explanations
from common.yaml_values import parse_yaml
from launch import slurm_client

NAME = re.compile(r"[A-Za-z_]\w*")
OURS = {  # {option of sbatch that a batch script sets: the option of a profile that it comes from, or ""}
    **{name: name for name in ("nodes", "partition", "qos", "account", "constraint", "reservation", "exclude")},
    **{"gpus-per-node": "gpus", "cpus-per-task": "cpus", "mem": "memory_gb", "time": "hours", "signal": "signal_delay"},
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "array", "requeue", "no-requeue", "no-kill"), ""),
    **dict.fromkeys(("ntasks-per-node", "test-only", "parsable", "wrap"), ""),
}


@dataclass
class Cluster(Section):
    """The resources that a job requests, and what its batch script does before the training. Empty text, null and []
    stand for nothing."""

    nodes: int | str = 1  # number of nodes, or a range such as 2-4: the job uses as many of them as it can get
    gpus: int = option(0, low=0)  # number of GPUs on each node; 0: the training runs on CPUs
    processes: int | None = option(None, low=1)  # number of processes on each node; null: one per GPU, else one
    # number of cores for each process; null: the cores of a node divided by its GPUs, or without GPUs one
    cpus: int | None = option(None, low=1)
    memory_gb: float | None = option(None, above=0)  # memory of each node
    hours: float = option(24.0, above=0)  # time limit; a job that reaches it is requeued and continues the run
    # seconds before the time limit at which the run saves a checkpoint and requeues its job
    signal_delay: int = option(120, low=1)
    max_restarts: int = option(3, low=0)  # largest number of restarts in a row without a trained step between them
    # seconds in which all nodes have to join and to complete an all-reduce before each attempt, once they run torch
    check_seconds: float = option(120.0, low=1)
    # profile for the jobs that evaluate exports, on the same cluster; empty: they are evaluated beside the training
    evaluation: str = ""
    partition: str = ""
    qos: str = ""  # quality of service
    account: str = ""  # account to which the time is charged
    constraint: str = ""  # features that nodes must have
    reservation: str = ""
    exclude: str = ""  # nodes not to use, such as n[1-3],n7
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, such as "--mail-type=FAIL"
    setup: list[str] = field(default_factory=list)  # lines of the batch script, such as "module load cuda"
    environment: list[str] = field(default_factory=list)  # variables of the job, such as NCCL_DEBUG=WARN
    container: str = ""  # image in which the processes run (pyxis: srun --container-image)
    mounts: list[str] = field(default_factory=list)  # folders in the container, such as /data or /data:/mnt/data
    # Python for the processes; empty: the Python that submits the job, or in a container that of the container
    python: str = ""

    def check(self) -> None:
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise ValueError(f"nodes = {self.nodes!r}: write a number or a range of numbers, such as nodes: 2-4")
        for entry in self.environment:
            if not NAME.fullmatch(entry.partition("=")[0]) or "=" not in entry:
                raise ValueError(f"environment = {entry!r}: write NAME=VALUE")
        for entry in self.sbatch:
            if not re.match(r"--[a-z]", entry):
                raise ValueError(f"sbatch = {entry!r}: write --OPTION=VALUE or --OPTION")
            name = entry.removeprefix("--").partition("=")[0]
            if taken := next((ours for ours in OURS if ours.startswith(name)), ""):  # sbatch takes shortened names
                remedy = f"write {OURS[taken]}" if OURS[taken] else "take it out"
                raise ValueError(f"sbatch = {entry!r}: --{taken} is set by `unlabeled launch`; {remedy}")
        for key, entries in (("environment", self.environment), ("setup", self.setup), ("sbatch", self.sbatch)):
            if found := next((entry for entry in entries if output.secrets_error(entry)), None):
                raise ValueError(
                    f"{key} = {found!r}: holds a password or a key, which would be stored in the job's folder; put it"
                    " into a file that only you can read, and write setup: ['. FILE']"
                )
        if self.mounts and not self.container:
            raise ValueError(f"mounts = {self.mounts}: there is no container; write container: IMAGE, or remove mounts")

    @property
    def min_nodes(self) -> int:
        return _range(self.nodes)[0]

    @property
    def max_nodes(self) -> int:
        return _range(self.nodes)[1]

    @property
    def processes_per_node(self) -> int:
        return self.processes or max(1, self.gpus)


def _range(nodes: int | str) -> tuple[int, int]:
    """(smallest, largest) number of nodes, from a number or a range; (0, 0) for any other text."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", str(nodes))
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


# ---------------------------------------------------------------- the file of profiles
def file() -> Path:
    """clusters.yaml of this user."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "unlabeled" / "clusters.yaml"


def profiles() -> dict[str, dict[str, Any]]:
    """{name: options} from the user's file; {} if there is no file."""
    path = file()
    try:
        found = parse_yaml(path.read_text(), str(path)) or {}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not a text file" if isinstance(error, ValueError) else error.strerror
        raise ConfigError(
            f"{path}: cannot be read ({reason}); mend it, or move it away and write a new one with --init"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no mapping; write NAME: {{OPTION: VALUE}} for each cluster")
    for name, options in found.items():
        if not isinstance(options, dict):
            raise ConfigError(
                f"{path}: {name} = {options!r}: write the options of a cluster, such as {name}: {{gpus: 8}}"
            )
    return found


def find(name: str, key: str = "--on", **options: Any) -> Cluster:
    """The profile `name`, in which `options` replace its values; an option that is None is not given. Raises
    ConfigError.

    Without a name, the only profile in the file is used; if the file has none, the options alone. `key`: the option
    with the name, for errors.
    """
    known, path = profiles(), file()
    if not name and len(known) > 1:
        raise ConfigError(f"{path} has several clusters; name one with --on {', --on '.join(known)}")
    if name and name not in known:
        how = "`unlabeled launch --init` writes the profile of this machine's cluster"
        raise ConfigError(f"{key} {name}: {path} has no such cluster; {nearest(name, known) if known else how}")
    name = name or next(iter(known), "")
    origin = {key: f"{path}: {name}" for key in known.get(name, {})}
    given = {key: value for key, value in options.items() if value is not None}
    origin |= dict.fromkeys(given, "command line")
    return build_config.build(Cluster, {**known.get(name, {}), **given}, origin or {"": "command line"})


# ---------------------------------------------------------------- unlabeled launch --init
def write_profile() -> str:
    """Add a commented profile of this machine's cluster to the file, with the partitions that `sinfo` lists. Returns a
    line about it. Raises UserError if there is no cluster, or the file already has one of that name."""
    name = slurm_client.cluster_name()
    path = file()
    if name in profiles():
        raise ConfigError(f"{path}: has the cluster {name} already; edit it there, or remove it and repeat the command")
    text = _profile(name, slurm_client.partitions())
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(("\n" if out.tell() else "") + text)
    return f"{path}: the cluster {name} was added; check it, then `unlabeled launch RECIPE key=value … --on {name}`"


def _profile(name: str, partitions: list[slurm_client.Partition]) -> str:
    """The text of a profile for the default partition, or else the first one. The options that sinfo does not determine
    are comments."""
    chosen = next((one for one in partitions if one.default), partitions[0])
    lines = ["# partitions that sinfo lists (nodes; cores, memory and GPUs of a node; time limit; features):"]
    lines += [f"#   {one}" for one in partitions]
    cpus_per_process = max(1, chosen.cpus // max(1, chosen.gpus))
    set_here = {"partition": chosen.name, "nodes": 1, "gpus": chosen.gpus, "cpus": cpus_per_process}
    set_here["hours"] = chosen.hours or 24.0
    lines.append(f"{name}:")
    meanings = explanations(Cluster)
    for key, value in set_here.items():
        lines.append(f"  {key}: {value}  # {meanings[key]}".rstrip(" #"))
    for key, item in config.fields(Cluster).items():
        if key not in set_here:
            value = item.default if item.default is not dataclasses.MISSING else []
            text = {None: "null", "": '""'}.get(value, value) if not isinstance(value, list) else "[]"
            lines.append(f"  # {key}: {text}  # {meanings[key]}".rstrip(" #"))
    return "\n".join(lines) + "\n"
