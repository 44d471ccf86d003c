"""The manifest with which Kubernetes trains a recipe: `unlabeled launch RECIPE --on kubernetes --dry-run` prints it. A pod
for each node runs torchrun, which reads its options from the variables PET_*; the resolved recipe is in the manifest.
This module does not import torch.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from pathlib import Path
from typing import Any

import yaml

from common import config
from common.errors import ConfigError, UserError
from launch import clusters, pod_rank
from launch.clusters import Cluster
from launch.supervisor import check_world
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import check_data

NAME = "kubernetes"  # of the profile
PORT = 29500
FOLDER = "/etc/unlabeled"  # in the container, with recipe.yaml
# the first pod is the meeting point, which torchrun does not recognize by all names of a pod
HOST = '[ "$JOB_COMPLETION_INDEX" = 0 ] && host=1 || host=0; export PET_RDZV_CONF="$PET_RDZV_CONF,is_host=$host"; exec "$@"'
COMMAND = ["sh", "-c", HOST, "sh"]  # and the Python of the image
ARGUMENTS = ["-m", "torch.distributed.run", "-m", "launch.pod_rank", f"{FOLDER}/recipe.yaml"]
GRACE_SECONDS = 120  # from SIGTERM to SIGKILL, in which the run saves a checkpoint
SHUTDOWN_SECONDS = 110  # of them, for the trainers; torchrun kills them after that
JOIN_SECONDS = 86400  # time for which a pod waits for the others, whose nodes may have to be started
CONNECT_SECONDS = 600  # time for which it waits for the first pod to listen
SLURM_ONLY = (
    *("partition", "qos", "account", "constraint", "reservation", "exclude", "sbatch", "setup", "evaluation"),
    *("hours", "signal_delay", "check_seconds"),
)
MAX_NAME = 40  # characters of a name without its hash; Kubernetes adds the number of the pod, and allows 63


def profile(options: dict[str, Any]) -> Cluster:
    """The profile `kubernetes` of the user's file, in which `options` replace its values. Raises ConfigError."""
    if NAME not in clusters.profiles():
        raise ConfigError(
            f"--on {NAME}: {clusters.file()} has no such profile; write {NAME}: {{container: IMAGE, mounts:"
            " [CLAIM:/FOLDER], nodes: 2, gpus: 8} there"
        )
    return clusters.find(NAME, **options)


def text(recipe: Recipe, cluster: Cluster) -> str:
    """A ConfigMap with the recipe, a headless Service, by which the pods find each other, and an Indexed Job."""
    name, claims = _checked(recipe, cluster)
    resources: dict[str, Any] = {"nvidia.com/gpu": cluster.gpus} if cluster.gpus else {}
    resources |= {"cpu": cluster.cpus * cluster.processes_per_node} if cluster.cpus else {}
    resources |= {"memory": f"{cluster.memory_gb:g}Gi"} if cluster.memory_gb else {}
    volumes: list[dict[str, Any]] = [
        {"name": "recipe", "configMap": {"name": name}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},  # of data workers: 64 MB by default
    ]
    places = [{"name": "recipe", "mountPath": FOLDER}, {"name": "memory", "mountPath": "/dev/shm"}]
    for number, (claim, path) in enumerate(claims.items()):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        places.append({"name": f"volume-{number}", "mountPath": path})
    container = {
        "name": "train",
        "image": cluster.container,
        "command": [*COMMAND, cluster.python or "python", *ARGUMENTS],
        "env": [
            {"name": key, "value": _Quoted(value)}
            for key, value in _environment(name, cluster, recipe.overwrite).items()
        ],
        # keys of stores and trackers: kubectl create secret generic unlabeled --from-literal=NAME=VALUE
        "envFrom": [{"secretRef": {"name": "unlabeled", "optional": True}}],
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": places,
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",  # a pod that fails is replaced by one of the same number
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": volumes,
    }
    nodes = cluster.max_nodes
    job: dict[str, Any] = {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    preempted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    job |= {"backoffLimit": nodes * cluster.max_restarts, "podFailurePolicy": {"rules": [preempted]}}
    job["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}  # of rank 0, which ends last
    job["template"] = {"spec": pod}
    service = {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True}
    documents = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"recipe.yaml": config.dump(recipe)},
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job},
    ]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def _checked(recipe: Recipe, cluster: Cluster) -> tuple[str, dict[str, str]]:
    """(name, {volume: folder in the container}). Raises UserError for what cannot be trained there."""
    check_data(recipe)
    check_world(recipe, cluster.max_nodes * cluster.processes_per_node)
    if cluster.min_nodes != cluster.max_nodes:
        raise ConfigError(f"nodes = {cluster.nodes}: a manifest has a fixed number; write --nodes {cluster.max_nodes}")
    if found := [key for key in SLURM_ONLY if getattr(cluster, key) != getattr(Cluster(), key)]:
        raise ConfigError(f"{found[0]} = {getattr(cluster, found[0])!r}: has no meaning on Kubernetes; take it out")
    if not cluster.container:
        raise ConfigError(
            f"container is missing; write container: IMAGE, in which unlabeled is installed, into the profile {NAME}"
        )
    volumes = dict(entry.rsplit(":", 1) for entry in cluster.mounts if ":/" in entry)
    if len(volumes) != len(cluster.mounts):
        raise ConfigError(f"mounts = {cluster.mounts}: on Kubernetes write CLAIM:/FOLDER, such as runs:/runs")
    run = recipe.run
    if not any(Path(run).is_relative_to(folder) for folder in volumes.values()):
        listed = ", ".join(volumes.values()) or "none"
        raise UserError(
            f"run = {run}: is in none of the volumes that all hosts share ({listed}); write run=/FOLDER/NAME, and"
            " mounts: [CLAIM:/FOLDER] in the profile"
        )
    return _name(run), volumes


def _name(run: str) -> str:
    """The name of a run's objects: a DNS label that begins with a letter, different for each run folder."""
    words = re.sub(r"[^a-z0-9]+", "-", Path(run).name.lower())[:MAX_NAME].strip("-")
    if not words[:1].isalpha():
        words = f"run-{words}".strip("-")
    return f"{words}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"


def _environment(name: str, cluster: Cluster, overwrite: bool) -> dict[str, str]:
    """The variables of the processes: those of torchrun, and the profile's own. With `overwrite`, each manifest has
    another id, because pods of the same id never overwrite the run a second time (`marker.is_restart`)."""
    run_id = f"{name}-{uuid.uuid4().hex[:8]}" if overwrite else name
    out = {"PET_NNODES": str(cluster.max_nodes), "PET_NPROC_PER_NODE": str(cluster.processes_per_node)}
    out |= {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"{name}-0.{name}:{PORT}", "PET_RDZV_ID": run_id}
    out |= {"PET_RDZV_CONF": f"join_timeout={JOIN_SECONDS},read_timeout={CONNECT_SECONDS}"}
    # torchrun also counts restarts after the eviction of a pod; `launch.pod_rank` counts those without a step
    out |= {"PET_MAX_RESTARTS": "1000000", pod_rank.MAX_RESTARTS: str(cluster.max_restarts)}
    out |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), "PYTHONSAFEPATH": "1"}
    return out | {key: value for key, _, value in (entry.partition("=") for entry in cluster.environment)}


class _Quoted(str):
    """A text that is written in quotes: Kubernetes takes 1e7 for a number, and PyYAML does not."""


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None),
)
_Dumper.add_representer(
    _Quoted, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", str(value), style='"')
)
