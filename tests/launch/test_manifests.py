"""Manifests are parsed, and their commands train a tiny model with their variables, in one process for each host. There
is no Kubernetes and no SkyPilot here."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import config
from common.errors import UserError
from launch import clusters, manifests, pod_rank
from launch.clusters import Cluster
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.marker import run_identity
from pretrain.run_folder.prepare import prepare
from pretrain.signals import EXIT_UNSCORED
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


def on_two_hosts(words: list[str], env: dict[str, str], number: str) -> None:
    """Run a command twice at the same time, as on two hosts. `number`: the variable with the number of the host."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    hosts = [
        subprocess.Popen(words, env={**settings, number: n}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for n in ("0", "1")
    ]
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
    told = documents(recipe, profile(tmp_path, environment=["NOTE=1"], python=sys.executable))
    pod = told["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    host, _, port = env["PET_RDZV_ENDPOINT"].partition(":")
    assert host == f"{told['Job']['metadata']['name']}-0.{pod['subdomain']}" and port and env["NOTE"] == "1"
    (tmp_path / "recipe.yaml").write_text(told["ConfigMap"]["data"]["recipe.yaml"])  # where the volume would put it
    command = [*container["command"][:-1], str(tmp_path / "recipe.yaml")]
    assert container["command"][-1] == "/etc/unlabeled/recipe.yaml"
    # both hosts have the name of this machine, so that only JOB_COMPLETION_INDEX tells which one listens
    on_two_hosts(command, {**env, "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}, "JOB_COMPLETION_INDEX")
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", "eval.pixels=false", "steps=4"))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5) and len(losses(run)) == 4
    assert "on 2 × cpu (ddp)" in (run / "log.txt").read_text()


def test_what_a_manifest_holds(shards: Path, tmp_path: Path):
    recipe = tiny(shards, tmp_path / "Run_1", "data.batch=48")
    cluster = profile(tmp_path, nodes=3, gpus=2, memory_gb=8.0, max_restarts=2, environment=["LIMIT=1e7"])
    told = documents(recipe, cluster)
    service, job = told["Service"], told["Job"]
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == name
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
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"], env["UNLABELED_MAX_RESTARTS"]) == ("3", "2", "2")
    # the pods wait for each other for longer than torchrun would, and trainers have the time to save a checkpoint
    assert env["PET_RDZV_CONF"] == "join_timeout=86400,read_timeout=600"
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert 'value: "1e7"' in manifests.text(recipe, cluster)  # unquoted, it would be a number for Kubernetes


def test_names_of_objects():
    """DNS labels that begin with a letter (RFC 1035), of at most 63 characters with the number of a pod; runs whose
    names are long, or in another folder, have others."""
    runs = [f"/runs/{name}" for name in ("2024", "A_b", "x" * 70, f"{'x' * 39}-y", f"{'x' * 70}z", "_", "é")]
    names = [manifests._name(run) for run in [*runs, "/other/A_b"]]
    assert len({*names}) == len(names)
    assert all(re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 55 for name in names), names
    assert names[0].startswith("run-2024-") and names[1].startswith("a-b-")


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Makes this process a rank on Kubernetes, whose trainer ends with a code. Its recipe trains in tmp_path / "run"."""
    (tmp_path / "recipe.yaml").write_text(config.dump(load("demo", [f"run={tmp_path / 'run'}"])))
    variables = {"LOCAL_RANK": "0", "UNLABELED_MAX_RESTARTS": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "recipe.yaml")])
    monkeypatch.setattr(pod_rank.tempfile, "gettempdir", lambda: str(tmp_path))

    def ends(code: object) -> None:
        monkeypatch.setattr(pod_rank.runpy, "run_module", lambda *_, **__: sys.exit(code))  # type: ignore[arg-type]

    return ends


def test_a_run_that_is_not_completely_scored_is_a_success(
    rank: Callable[[object], None], capsys: pytest.CaptureFixture
):
    rank(EXIT_UNSCORED)
    assert pod_rank.train() == 0 and "is trained, but not completely scored" in capsys.readouterr().out
    rank(1)
    with pytest.raises(SystemExit, match="1"):
        pod_rank.train()


def test_a_pod_ends_after_restarts_without_a_step(
    rank: Callable[[object], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *words: killed.append(words))
    monkeypatch.setattr(pod_rank.time, "sleep", lambda seconds: sys.exit("torchrun ends this process"))
    for restarts in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        rank(1)
        with pytest.raises(SystemExit, match=r"^1$"):
            pod_rank.train()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with pytest.raises(SystemExit, match="torchrun ends this process"):
        pod_rank.train()
    assert killed == [(os.getppid(), signal.SIGTERM)]
    assert "more than 1 restarts without a further step" in capsys.readouterr().out


def test_a_manifest_that_overwrites_does_it_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pod that is replaced has the id of its manifest; a new manifest has another one."""

    def prepared(manifest: str) -> str:
        """The id of the run after a pod of the manifest has started it."""
        variables = [*yaml.safe_load_all(manifest)][2]["spec"]["template"]["spec"]["containers"][0]["env"]
        (found,) = (one["value"] for one in variables if one["name"] == "PET_RDZV_ID")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", found)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        return run_identity(prepare(cfg.replace()))["id"]

    cfg = tiny(shards, tmp_path / "run", "overwrite=true")
    first, second = (manifests.text(cfg, profile(tmp_path)) for _ in range(2))
    ids = [prepared(manifest) for manifest in (first, first, second, second)]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_a_pod_counts_restarts_without_a_step(tmp_path: Path):
    """And not those after evictions, between which the run has trained."""
    path = tmp_path / "pod.json"
    done = [(0, 0), (0, 1), (5, 2), (5, 3), (3, 4), (6, 5)]  # (trained steps, restarts)
    assert [pod_rank.in_a_row(steps, restarts, path) for steps, restarts in done] == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"container": "", "mounts": []}, "write container: IMAGE"),
        ({"nodes": "2-4"}, "a manifest has a fixed number; write --nodes 4"),
        ({"partition": "gpu"}, "partition = 'gpu': has no meaning on Kubernetes"),
        ({"hours": 2.0}, r"hours = 2\.0: has no meaning on Kubernetes"),
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
    assert [kind for kind, _ in names] == ["ConfigMap", "Service", "Job"] * 2
    assert [name.rpartition("-")[0] for _, name in names] == ["run-seed-0"] * 3 + ["run-seed-1"] * 3
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
    env["SKYPILOT_TASK_ID"] = "sky-managed-2026-01-02-03-04-05-678901_mine_1-0"  # that of a job and its recoveries
    on_two_hosts(
        ["bash", "-ec", script],
        {**task["envs"], **env, "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"},
        "SKYPILOT_NODE_RANK",
    )
    assert len(losses(tmp_path / "run")) == 4
