"""Manifests are parsed, and their commands train a tiny model with their variables, in one process for each host. There
is no Kubernetes and no SkyPilot here."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import config
from common.errors import UserError
from launch import clusters, manifests
from launch.clusters import Cluster
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import call, tiny_recipe

DOCS = Path(__file__).parents[2] / "docs"


def tiny(shards: Path, run: Path, *overrides: str) -> Recipe:
    return tiny_recipe("mae", shards, run, "parallel.mode=ddp", "eval.pixels=false", "steps=4", *overrides)


def profile(folder: Path, **options: Any) -> Cluster:
    values = {"container": "registry/unlabeled:1", "mounts": [f"runs:{folder}"], "nodes": 2, "cpus": 1, **options}
    return Cluster(**values)


def documents(recipe: Recipe, cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(manifests.text(recipe, cluster))}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def on_two_hosts(words: list[str], env: dict[str, str]) -> None:
    """Run a command twice at the same time, as on two hosts."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    hosts = [subprocess.Popen(words, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in (0, 1)]
    try:
        outputs = [host.communicate(timeout=240)[0].decode() for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


@pytest.mark.slow
def test_the_command_of_the_manifest_trains_on_two_hosts(shards: Path, tmp_path: Path):
    run = tmp_path / "A run"
    recipe = tiny(shards, run)
    told = documents(recipe, profile(tmp_path, environment=["NOTE=1"]))
    pod = told["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    host, _, port = env["PET_RDZV_ENDPOINT"].partition(":")
    assert host == f"{told['Job']['metadata']['name']}-0.{pod['subdomain']}" and port and env["NOTE"] == "1"
    (tmp_path / "recipe.yaml").write_text(told["ConfigMap"]["data"]["recipe.yaml"])  # where the volume would put it
    command = [sys.executable, *container["command"][1:-1], str(tmp_path / "recipe.yaml")]
    assert container["command"][0] == "python" and container["command"][-1] == "/etc/unlabeled/recipe.yaml"
    on_two_hosts(command, {**env, "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"})
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", "eval.pixels=false", "steps=4"))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5) and len(losses(run)) == 4
    assert "on 2 × cpu (ddp)" in (run / "log.txt").read_text()


def test_what_a_manifest_holds(shards: Path, tmp_path: Path):
    recipe = tiny(shards, tmp_path / "Run_1", "data.batch=48")
    told = documents(recipe, profile(tmp_path, nodes=3, gpus=2, memory_gb=8.0, max_restarts=2))
    service, job = told["Service"], told["Job"]
    name = job["metadata"]["name"]
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) and service["metadata"]["name"] == name
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (spec["backoffLimit"], pod["restartPolicy"], pod["subdomain"]) == (6, "Never", name)
    (container,) = pod["containers"]
    assert container["image"] == "registry/unlabeled:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "cpu": 2, "memory": "8Gi"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    places = {place["mountPath"]: volumes[place["name"]] for place in container["volumeMounts"]}
    assert places[str(tmp_path)]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert places["/etc/unlabeled"]["configMap"] == {"name": told["ConfigMap"]["metadata"]["name"]}
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"], env["PET_MAX_RESTARTS"]) == ("3", "2", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"container": "", "mounts": []}, "write container: IMAGE"),
        ({"nodes": "2-4"}, "a manifest has a fixed number; write --nodes 4"),
        ({"partition": "gpu"}, "partition = 'gpu': has no meaning on Kubernetes"),
        ({"mounts": ["/data"]}, "on Kubernetes write CLAIM:/FOLDER"),
        ({"mounts": ["data:/data"]}, "is in none of the volumes that all hosts share .*/data"),
        ({"nodes": 5}, "16"),
    ],
)
def test_what_a_manifest_refuses(shards: Path, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        manifests.text(tiny(shards, tmp_path / "run"), profile(tmp_path, **options))


def test_the_command_prints_a_manifest_for_each_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    words = ["launch", "mae_vits16", f"data.train={shards}", f"run={tmp_path}/run", "parallel.mode=ddp"]
    on = ["--on", "kubernetes", "--nodes", 2, "--array", "seed=0,1"]
    with pytest.raises(UserError, match=r"has no such profile; write kubernetes: \{container: IMAGE"):
        call(*words, *on, "--dry-run")
    clusters.file().parent.mkdir()
    clusters.file().write_text(f"kubernetes: {{container: x, mounts: ['runs:{tmp_path}']}}\n")
    assert call(*words, *on, "--dry-run") == 0
    names = [(one["kind"], one["metadata"]["name"]) for one in yaml.safe_load_all(capsys.readouterr().out)]
    assert names == [(kind, f"run-seed-{n}") for n in (0, 1) for kind in ("ConfigMap", "Service", "Job")]
    with pytest.raises(UserError, match="kubectl apply -f job"):
        call(*words, *on)


@pytest.mark.matrix
def test_the_task_of_the_documentation_trains_on_two_hosts(shards: Path, tmp_path: Path):
    """With the variables that SkyPilot sets; the recipe is made small."""
    page = (DOCS / "cluster.md").read_text()
    (text,) = re.findall(r"^# sky.yaml\n(.*?)^```$", page, re.M | re.S)
    task = yaml.safe_load(text)
    path = tmp_path / "tiny.yaml"
    path.write_text(config.dump(tiny(shards, tmp_path / "run")))
    before = "mae_vits16 data.train=s3://bucket/train run=/runs/mine"
    assert before in task["run"] and ":29500" in task["run"] and task["volumes"] == {"/runs": "runs"}
    script = task["run"].replace(before, str(path)).replace(":29500", f":{free_port()}")
    script = script.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    env = {"SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    on_two_hosts(["bash", "-ec", script], {**task["envs"], **env, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"})
    assert len(losses(tmp_path / "run")) == 4
