"""Runs as jobs of a real Slurm cluster on loopback. Whatever happens to a job, the losses of its run are those of an
undisturbed run of one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common import config
from common.errors import UserError
from eval import results
from launch import batch_script, clusters, evaluation_jobs, job_of_run, slurm, status
from launch.clusters import Cluster
from launch.file_tails import last_step
from launch.job_of_run import job_of
from launch.rank_records import ranks_of
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.recipes.recipe import Recipe, load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.run_lock import living_holder
from pretrain.signals import EXIT_UNSCORED
from pretrain.train import train
from tests import hosts
from tests.conftest import TINY, call, unlabeled
from tests.contract.own_objectives import OWN
from tests.slurm import SlurmCluster, missing

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
STEPS = 40
# what an objective's forward does here: take its time, so that a test can do something to the run, and fail if asked
FORWARD = """
        time.sleep(float(os.environ.get("STEP_SECONDS", "0.1")))
        if step == int(os.environ.get("FAIL_AT", "-1")):
            raise RuntimeError(f"step {step} fails")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes; tests find the cluster by environment variables."""
    if reason := missing():
        pytest.skip(f"NO SLURM HERE, SO NOTHING OF `unlabeled launch` IS TESTED: {reason}")
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=3) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield cluster


@pytest.fixture(autouse=True)
def idle(cluster: SlurmCluster) -> Iterator[None]:
    """Each test begins with nodes that are up and have no job."""
    yield
    cluster.run("scancel", "--user=root")
    for node in cluster.nodes:
        if cluster.daemons[node].poll() is not None:
            cluster.start_node(node)
    cluster.wait_idle()


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's objective whose steps take some time."""
    path = tmp_path_factory.mktemp("methods") / "slow.py"
    text = OWN["labels"].replace("from dataclasses", "import os\nimport time\nfrom dataclasses", 1)
    line = "        logits = self.head("
    assert line in text
    path.write_text(text.replace(line, f"{FORWARD}{line}"))
    return path


@pytest.fixture(scope="module")
def finished(method: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of one process."""
    return train(recipe(method, shards, tmp_path_factory.mktemp("whole") / "run", "parallel.mode=single"))


@pytest.fixture(scope="module")
def whole(finished: Path) -> list[tuple[int, float]]:
    """Its losses."""
    return losses(finished)


def recipe(method: Path, shards: Path, run: Path, *overrides: str) -> Recipe:
    few = [f"steps={STEPS}", "checkpoint=10", "export=1000", "log=1", "log.flops=false", "data.batch=16"]
    more = [f"objective={method}", f"data.train={shards}", "data.workers=0", "eval.pixels=false", "optim.lr=1e-3"]
    return load("demo", [*TINY, *few, *more, "parallel.mode=ddp", "parallel.timeout=30", f"run={run}", *overrides])


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in read_rows(run / "metrics.jsonl")]


def checkpoints(run: Path) -> list[int]:
    return [int(path.name) for path in complete_checkpoints(run)]


class Job:
    """A run as a job."""

    def __init__(self, cluster: SlurmCluster, recipe: Recipe, **options: object):
        self.cluster, self.run = cluster, Path(recipe.run)
        slurm.submit([recipe], Cluster(cpus=1, **options))  # type: ignore[arg-type]
        told = json.loads((self.run / "job.json").read_text())
        self.id, self.folder = told["id"], Path(told["folder"]) / str(told["number"])

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "state.json").read_text())

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.folder.parent.glob("*_log.out"))

    def trains(self, steps: int = 1, attempt: int = 1) -> None:
        """Wait until an attempt has trained a step, and the run has at least this number of steps."""
        there = (self.folder / f"attempt-{attempt}").is_dir
        self.cluster.wait(lambda: there() and last_step(self.run) >= steps, f"{steps} steps\n{self.log}", 120)

    def ends(self, state: str = "COMPLETED", ended: str = "finished", seconds: float = 240) -> None:
        found = self.cluster.wait_for(
            self.id, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", seconds=seconds
        )
        assert (found, self.state["ended"]) == (state, ended), f"{found}\n{self.log}"

    @property
    def run_log(self) -> str:
        return (self.run / "log.txt").read_text()


def test_two_nodes_train_as_one_process_does(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """The command, its batch script, and the same command again while the run is in the queue."""
    run, path = tmp_path / "a run", tmp_path / "tiny.yaml"
    path.write_text(config.dump(recipe(method, shards, run)))
    words = ["launch", path, "--nodes", 2, "--cpus", 1, "--hours", 0.5, "--partition", "main"]
    script = unlabeled(*words, "--dry-run").stdout
    first = unlabeled(*words)
    assert first.returncode == 0 and "queued as job" in first.stdout, first.stdout + first.stderr
    again = unlabeled(*words)
    assert again.returncode == 0 and "is queued already, as job" in again.stdout, again.stdout + again.stderr
    job = json.loads((run / "job.json").read_text())
    submitted = Path(job["folder"]) / f"{job['id']}_submission.sh"
    assert submitted.read_text().strip() == script.strip() and "#SBATCH --nodes=2" in script
    state = cluster.wait_for(job["id"], "COMPLETED", "FAILED")
    assert state == "COMPLETED", (Path(job["folder"]) / f"{job['id']}_0_log.out").read_text()
    assert losses(run) == whole and len(whole) == STEPS
    ranks = ranks_of(Path(job["folder"]) / "0" / "attempt-1")
    assert [rank["node"] for rank in ranks.values()] == ["n1", "n2"]


def test_a_preempted_job_saves_requeues_and_goes_on(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """A job of a partition with higher priority takes all nodes; no step is trained twice."""
    options = {"nodes": 2, "partition": "main", "environment": ["STEP_SECONDS=0.3"]}  # Slurm takes seconds to preempt
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10"), **options)
    job.trains(3)
    words = ("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    other = cluster.run("sbatch", "--parsable", *words).stdout.strip()
    cluster.wait_for(other, "COMPLETED")
    done = last_step(job.run)
    assert 3 <= done < STEPS and max(checkpoints(job.run)) == done  # no step was lost
    job.ends()
    assert losses(job.run) == whole
    check_rows(job.run, *EXPORTS)
    assert job.state["attempts"] == 2 and job.state["restarts"] == 0
    assert f"resumes from step {done} " in job.run_log


def test_a_killed_rank_is_named_and_the_run_goes_on(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """The same job resumes from the last checkpoint, and the log states the time that this took."""
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10"), nodes=2)
    job.trains(12)
    rank = ranks_of(job.folder / "attempt-1")[1]
    os.kill(rank["pid"], signal.SIGKILL)
    job.ends()
    assert losses(job.run) == whole
    check_rows(job.run, *EXPORTS)
    text = job.run_log
    assert "rank 1 on n2 was killed by SIGKILL after" in text and "the last lines of its log: " in text
    assert re.search(r"resumes from step [123]0 ", text) and re.search(r"trains again \d+\.\d s after the fault", text)
    assert job.state == {
        "attempts": 2,
        "restarts": 1,
        "in_a_row": 0,
        "reached": job.state["reached"],
        "ended": "finished",
        "bad_nodes": {},
    }


# ---------------------------------------------------------------- submission
def sbatch_that(does: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a script before sbatch in PATH: `does` holds "$@" behind the real one's path, as {sbatch}."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "sbatch"
    script.write_text(f"#!/bin/sh\n{does.format(sbatch=shutil.which('sbatch'))}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def jobs_in_queue(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%i").stdout.split()


def test_a_job_that_sbatch_refuses_deletes_nothing(
    cluster: SlurmCluster, finished: Path, method: Path, shards: Path, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    cfg = recipe(method, shards, run, "overwrite=true")
    with pytest.raises(UserError) as error:
        slurm.submit([cfg], Cluster(cpus=1, partition="nowhere"))
    assert last_step(run) == STEPS and complete_checkpoints(run)
    assert "sbatch --test-only" in str(error.value) and "partition" in str(error.value)
    assert [path.name for path in (tmp_path / "jobs").iterdir() if path.name.startswith("run")] == []


def test_ctrl_c_after_sbatch_keeps_the_job(
    cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The interrupt arrives when Slurm has accepted the job, and its id is not known yet."""
    sbatch_that('{sbatch} "$@"; kill -INT $PPID; sleep 0.5', tmp_path, monkeypatch)
    run, path = tmp_path / "run", tmp_path / "tiny.yaml"
    path.write_text(config.dump(recipe(method, shards, run)))
    done = unlabeled("launch", path, "--cpus", 1)
    assert done.returncode == 130, done.stdout + done.stderr
    assert jobs_in_queue(cluster) == [job_of(run)["id"]]
    assert (Path(job_of(run)["folder"]) / "0.yaml").is_file()


def test_a_run_that_is_launched_twice_at_once_is_queued_once(
    cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sbatch_that('sleep 2; exec {sbatch} "$@"', tmp_path, monkeypatch)
    run, path = tmp_path / "run", tmp_path / "tiny.yaml"
    path.write_text(config.dump(recipe(method, shards, run)))
    with ThreadPoolExecutor() as pool:
        both = [*pool.map(lambda _: unlabeled("launch", path, "--cpus", 1), range(2))]
    said = sorted("is queued already" if "is queued already" in one.stdout else "queued as job" for one in both)
    assert [one.returncode for one in both] == [0, 0] and said == ["is queued already", "queued as job"], both
    assert jobs_in_queue(cluster) == [job_of(run)["id"]]


def test_a_job_belongs_to_one_run_of_one_cluster(
    cluster: SlurmCluster, finished: Path, method: Path, shards: Path, tmp_path: Path
):
    run, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(finished, run)
    job_of_run.write_job(run, tmp_path / "jobs" / "run-1", 0, "1", "elsewhere")
    with pytest.raises(
        UserError, match=r"is trained by job 1 of the cluster elsewhere, and this machine belongs to local"
    ):
        slurm.submit([recipe(method, shards, run)], Cluster(cpus=1))
    with pytest.raises(UserError, match="of the cluster elsewhere"):
        call("stop", run)
    shutil.copytree(run, copy)
    assert job_of(run)["run"] == str(run) and job_of(copy) == {}


def test_the_data_are_provided_and_checked_before_the_job_is_queued(
    cluster: SlurmCluster, method: Path, photos: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As `unlabeled train` does it: shards of folders of images, and what scores need."""
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"^eval.val: .*nothing: no such file or folder"):
        slurm.submit(
            [recipe(method, shards, run, f"eval.val={tmp_path / 'nothing'}", f"eval.gallery={shards}")], Cluster()
        )
    assert not run.exists() and jobs_in_queue(cluster) == []
    slurm.submit([recipe(method, photos, run)], Cluster(cpus=1))
    (spec,) = load(Path(job_of(run)["folder"]) / "0.yaml").data.train
    assert Path(spec).is_relative_to(tmp_path / "cache") and [*Path(spec).glob("*.tar")]


def test_cores_that_are_not_given_are_the_share_of_the_gpus(cluster: SlurmCluster):
    """The last node has four cores and two GPUs, the others have none."""
    assert batch_script.cores_per_node(Cluster(gpus=2)) == 4
    assert batch_script.cores_per_node(Cluster(gpus=1, partition="high")) == 2
    assert batch_script.cores_per_node(Cluster(gpus=2, cpus=1)) == 2 and batch_script.cores_per_node(Cluster()) == 1
    with pytest.raises(
        UserError, match="cpus is not given, and sinfo shows no GPUs in the partition small; write --cpus N"
    ):
        batch_script.cores_per_node(Cluster(gpus=1, partition="small"))


# ---------------------------------------------------------------- evaluation jobs
SCORED = ("export=1000", "eval.quick=[knn]")
EXPORTS = (0, 10, 20, 30, STEPS)  # the steps that are exported with export=10


def scored(method: Path, shards: Path, run: Path, *overrides: str) -> Recipe:
    """A recipe whose exports are evaluated."""
    return recipe(method, shards, run, *SCORED, f"eval.gallery={shards}", f"eval.val={shards}", *overrides)


def check_rows(run: Path, *steps: int) -> None:
    """The evaluations of these exports have written each row once."""
    rows = Counter(tuple(row[key] for key in results.KEY) for row in read_rows(run / "results.jsonl"))
    models = {("untrained" if step == 0 else "pretrained", step, "knn", "val") for step in steps}
    assert {row[:4] for row in rows} == models and set(rows.values()) == {1}, rows


def write_profile(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """clusters.yaml with a profile `small` for evaluation jobs."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    path = clusters.file()
    path.parent.mkdir()
    path.write_text(json.dumps({"small": {"cpus": 1, "hours": 1, **options}}))


def watcher_of(run: Path) -> int:
    """The process id of the watcher that holds the lock of a run's evaluations; 0 without one."""
    holder = living_holder(run / "evaluations") if (run / "evaluations").is_dir() else None
    return holder["pid"] if holder else 0


def test_exports_are_evaluated_by_jobs_once_each(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first one fails and is tried again; the watcher is killed, and later its job is requeued."""
    fails_once = f'case "$SLURM_JOB_NAME" in *-val-*) mkdir {tmp_path}/once && exit 3;; esac'
    write_profile(tmp_path, monkeypatch, setup=[fails_once])
    cfg = scored(method, shards, tmp_path / "run")
    job = Job(cluster, cfg, evaluation="small", environment=["STEP_SECONDS=0.3"])
    cluster.wait(lambda: watcher_of(job.run), "the watcher runs")
    first = watcher_of(job.run)
    cluster.wait((tmp_path / "once").is_dir, "the first evaluation has failed")
    os.kill(first, signal.SIGKILL)
    cluster.wait(lambda: watcher_of(job.run) not in (0, first), "the watcher is started again")
    watch = json.loads((job.folder.parent / "watch.json").read_text())["id"]
    cluster.run("scontrol", "requeue", watch)
    job.ends()
    assert losses(job.run) == whole
    assert cluster.wait_for(watch, "COMPLETED", "FAILED", seconds=240) == "COMPLETED", job.log
    check_rows(job.run, 0, STEPS)
    submitted = [*(job.folder.parent / "evaluations").glob("*_submission.sh")]
    assert len(submitted) == 3 and "is tried again: job" in job.run_log
    folder = job.folder.parent
    assert evaluation_jobs.watch(folder) == 0 and len([*(folder / "evaluations").glob("*_submission.sh")]) == 3


def evaluation_folder(finished: Path, shards: Path, folder: Path, **options: object) -> tuple[Path, Path]:
    """A copy of the finished run, of which the last export is to be evaluated, and the folder of its job."""
    run, job = folder / "run", folder / "jobs" / "run-1"
    shutil.copytree(finished, run)
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        text.replace("  val: []", f"  val: [{shards}]").replace("  gallery: []", f"  gallery: [{shards}]")
    )
    shutil.rmtree(run / "export" / "0")
    job.mkdir(parents=True)
    write_job_json(job, run, **options)
    return run, job


def write_job_json(job: Path, run: Path, **options: object) -> None:
    profile = config.to_dict(Cluster(cpus=1, **options))  # type: ignore[arg-type]
    (job / "job.json").write_text(json.dumps({"runs": [str(run)], "evaluation": profile}))


def test_evaluations_whose_jobs_sbatch_refuses_are_recorded_as_failed(
    cluster: SlurmCluster, finished: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """When the run has ended, and sbatch has been asked several times."""
    for name, value in (("MAX_REFUSALS", 2), ("REFUSED_SECONDS", 0.0), ("POLL", 0.1), ("ASK_SECONDS", 0.5)):
        monkeypatch.setattr(evaluation_jobs, name, value)
    run, job = evaluation_folder(finished, shards, tmp_path, partition="nowhere")
    assert evaluation_jobs.watch(job) == EXIT_UNSCORED and jobs_in_queue(cluster) == []
    assert evaluation_jobs.failed(run) == [f"pretrained-{STEPS}-val"]
    log = (run / "log.txt").read_text()
    assert (
        log.count("evaluations wait: sbatch refuses the job: ") == 1
        and "on val failed: sbatch refuses the job: " in log
    )


@pytest.mark.matrix
def test_a_run_is_stopped_at_once_with_its_evaluation_jobs(
    cluster: SlurmCluster,
    method: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """Two evaluations run, and take long."""
    write_profile(tmp_path, monkeypatch, setup=['case "$SLURM_JOB_NAME" in *-val-*) sleep 600;; esac'])
    cfg = scored(method, shards, tmp_path / "run", "export=5")
    job = Job(cluster, cfg, evaluation="small", nodes=2, environment=["STEP_SECONDS=1"])
    job.trains(7)

    def shown() -> str:
        call("status", job.run)
        return capsys.readouterr().out.splitlines()[-1]

    both = r"evaluation jobs: 0 done; running: step 0 on val \(job \d+\), step 5 on val \(job \d+\)$"
    cluster.wait(lambda: re.search(both, shown()), "both evaluations run")
    call("stop", job.run, "--now")
    assert re.search(r"is cancelled, and its evaluations: jobs \d+, \d+, \d+$", capsys.readouterr().out.strip())
    cluster.wait(lambda: jobs_in_queue(cluster) == [], "all jobs have ended")


@pytest.mark.matrix
def test_an_evaluation_that_fails_again_is_recorded_as_failed(
    cluster: SlurmCluster, finished: Path, shards: Path, tmp_path: Path
):
    run, folder = evaluation_folder(finished, shards, tmp_path, python="/bin/false")
    assert evaluation_jobs.watch(folder) == EXIT_UNSCORED
    assert evaluation_jobs.failed(run) == [f"pretrained-{STEPS}-val"]
    said = r"on val failed: 3 attempts failed; the last one: srun: error: n\d: task 0: Exited with exit code 1"
    assert re.search(said, (run / "log.txt").read_text())
    assert (
        evaluation_jobs.watch(folder) == EXIT_UNSCORED and len([*(folder / "evaluations").glob("*_submission.sh")]) == 3
    )
    write_job_json(folder, run)
    (line,) = evaluation_jobs.submit_watcher(folder)  # as the same command does: a new watcher tries again
    (watch,) = re.findall(r"job (\d+) submits", line)
    assert evaluation_jobs.submit_watcher(folder) == []  # it is in the queue
    assert cluster.wait_for(watch, "COMPLETED", "FAILED", seconds=240) == "COMPLETED"
    assert results.scored(run / "results.jsonl") == {("pretrained", STEPS, "val", "knn")}
    assert not evaluation_jobs.failed(run)


# ---------------------------------------------------------------- the rest, for `make test-matrix`
@pytest.mark.matrix
def test_the_time_limit(cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path):
    """Slurm may send the signal up to a minute early."""
    options = {"hours": 3 / 60, "signal_delay": 80, "environment": ["STEP_SECONDS=3"]}
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10"), nodes=1, processes=1, **options)
    job.ends(seconds=500)
    assert losses(job.run) == whole
    check_rows(job.run, *EXPORTS)
    assert job.state["attempts"] >= 2 and job.state["restarts"] == 0
    assert re.search(r"requeues itself after \d+ steps", job.run_log)


@pytest.mark.matrix
def test_a_job_that_an_operator_requeues(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10"), nodes=2, environment=["STEP_SECONDS=0.3"])
    job.trains(3)
    cluster.run("scontrol", "requeue", job.id)
    job.ends()
    assert losses(job.run) == whole
    assert job.state["attempts"] == 2
    check_rows(job.run, *EXPORTS)
    (step,) = map(int, re.findall(r"resumes from step (\d+) ", job.run_log))
    assert 3 <= step < STEPS and step % 10  # where it was when it was asked, not a regular checkpoint


@pytest.mark.matrix
def test_a_rank_that_hangs_is_named(cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path):
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10", "parallel.timeout=10"), nodes=2)
    job.trains(12)
    os.kill(ranks_of(job.folder / "attempt-1")[1]["pid"], signal.SIGSTOP)
    job.ends()
    assert losses(job.run) == whole
    check_rows(job.run, *EXPORTS)
    assert "rank 1 on n2 did not end by itself, so it hung or its node was lost, after" in job.run_log


@pytest.mark.matrix
@pytest.mark.parametrize(("nodes", "left"), [("1-2", "1 processes on n1"), ("2-3", "2 processes on n1, n3")])
def test_a_node_that_is_lost_is_left_out(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path, nodes: str, left: str
):
    """All its processes end at once; the job continues on the other nodes, without a requeue. Of three nodes, the third
    one is a spare, because three processes do not divide the batch."""
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10"), nodes=nodes)
    job.trains(12)
    cluster.kill_node("n2")
    job.ends()
    assert losses(job.run) == whole
    check_rows(job.run, *EXPORTS)
    assert "n2 is left out: " in job.run_log and f"{left}\n" in job.run_log
    assert job.state["attempts"] == 2


@pytest.mark.matrix
def test_the_loss_of_the_first_node_requeues_the_job(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """The supervisor is lost with it; the rank on the other node hears no heartbeat and requeues the job."""
    job = Job(cluster, scored(method, shards, tmp_path / "run", "export=10"), nodes=2)
    job.trains(12)
    cluster.kill_node("n1")
    job.ends(seconds=400)
    assert losses(job.run) == whole
    check_rows(job.run, *EXPORTS)
    assert (
        "n2 requeues the job, because the heartbeat of the supervisor has ended" in job.run_log
        and "2 processes on n2, n3" in job.run_log
    )


@pytest.mark.matrix
def test_the_loss_of_the_first_node_between_two_attempts_requeues_the_job(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """A rank has died, and the nodes are checked again, which takes long on one of them: no rank runs."""
    python, slow, checked = (tmp_path / name for name in ("python", "slow", "checked"))
    condition = f'[ -e {slow} ] && [ "$3" = launch.node_check ] && [ "$SLURMD_NODENAME" = n2 ]'
    python.write_text(f'#!/bin/sh\nif {condition}; then touch {checked}; sleep 20; fi\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = Job(cluster, recipe(method, shards, tmp_path / "run"), nodes=2, python=str(python))
    job.trains(12)
    slow.touch()
    os.kill(ranks_of(job.folder / "attempt-1")[1]["pid"], signal.SIGKILL)
    cluster.wait(checked.exists, "the nodes are checked again")
    cluster.kill_node("n1")
    slow.unlink()
    job.ends(seconds=400)
    assert losses(job.run) == whole
    assert "n2 requeues the job, because the heartbeat" in job.run_log and "2 processes on n2, n3" in job.run_log


@pytest.mark.matrix
def test_a_fixed_number_of_nodes_comes_from_the_queue_again(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """The job is requeued without the lost node, and gets the third one."""
    job = Job(cluster, recipe(method, shards, tmp_path / "run"), nodes=2)
    job.trains(12)
    cluster.kill_node("n2")
    job.ends()
    assert losses(job.run) == whole
    assert "1 of 2 nodes can be used" in job.run_log and "2 processes on n1, n3" in job.run_log


@pytest.mark.matrix
def test_a_job_comes_back_on_more_nodes(cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path):
    """Another job has two of the three nodes, and ends."""
    words = ("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    other = cluster.run("sbatch", "--parsable", *words).stdout.strip()
    cluster.wait_for(other, "RUNNING")
    job = Job(cluster, recipe(method, shards, tmp_path / "run"), nodes="1-2", environment=["STEP_SECONDS=0.3"])
    job.trains(3)
    cluster.run("scancel", other)
    cluster.wait_for(other, "CANCELLED")
    cluster.run("scontrol", "requeue", job.id)
    job.ends()
    assert losses(job.run) == whole
    assert re.findall(r"attempt (\d): (\d) processes", job.run_log) == [("1", "1"), ("2", "2")]


@pytest.mark.matrix
def test_the_link_between_two_nodes_is_cut(
    method: Path, shards: Path, whole: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """For a few seconds: the ranks wait, and go on. For good: the job continues on the other node."""
    if reason := hosts.missing():
        pytest.skip(f"NO NETWORK NAMESPACES HERE, SO A LOST NETWORK IS NOT TESTED: {reason}")
    run, path, log = tmp_path / "run", tmp_path / "tiny.yaml", tmp_path / "run" / "log.txt"
    path.write_text(config.dump(scored(method, shards, run, "export=10", "parallel.timeout=16")))
    monkeypatch.setenv("STEP_SECONDS", "0.2")
    with hosts.TwoHosts() as two, SlurmCluster(tmp_path / "slurm", slurmd_timeout=60, hosts=two) as there:
        command = [sys.executable, "-m", "launch.cli", "launch", path]
        there.run(*command, "--nodes", "1-2", "--cpus", 1, timeout=120)
        there.wait(lambda: last_step(run) >= 2, "2 steps", 120)
        two.cut()
        time.sleep(6)
        two.connect()
        there.wait(lambda: last_step(run) >= 12, "12 steps", 30)
        two.cut()
        there.wait(lambda: "trains again" in log.read_text(), "it trains again", 180)
        two.connect()  # so that Slurm can end the job
        job = job_of(run)["id"]
        assert there.wait_for(job, "COMPLETED", "FAILED", seconds=120) == "COMPLETED", log.read_text()
    text = log.read_text()
    assert losses(run) == whole
    check_rows(run, *EXPORTS)
    # the rank that ended first is named, with the end of its log; srun does not get that of the other host
    said = r"(rank 0 on n1 ended with code 1 after \d+ steps; .*; no answer from rank 1 on n2: |rank 1 on n2 ended with code 1)"
    assert len(re.findall(said, text)) == 1 and "n2 is left out: " in text, text
    assert re.findall(r"attempt (\d): (\d) processes", text) == [("1", "2"), ("2", "1")]


@pytest.mark.matrix
def test_a_node_that_fails_the_check_is_left_out(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" = n2 ] && echo no library >&2 && exit 3\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    cfg = scored(method, shards, tmp_path / "run", "export=10")
    job = Job(cluster, cfg, nodes="1-2", python=str(python))
    job.ends()
    assert losses(job.run) == whole and job.state["attempts"] == 1
    check_rows(job.run, *EXPORTS)
    assert "n2 is left out: no library" in job.run_log and "1 processes on n1" in job.run_log


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("exec sleep 600", "did not join the other nodes in "),
        ("export GLOO_SOCKET_IFNAME=nothing0", "an all-reduce with the other nodes failed: "),
    ],
)
def test_a_node_that_does_not_compute_with_the_others_is_left_out(
    cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path, does: str, reason: str
):
    """It passes the checks of a single node."""
    python = tmp_path / "python"
    condition = '[ "$SLURMD_NODENAME" = n2 ] && [ "$3" = launch.collective_check ]'
    python.write_text(f'#!/bin/sh\nif {condition}; then {does}; fi\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = {"nodes": "1-2", "python": str(python), "check_seconds": 20.0}
    job = Job(cluster, recipe(method, shards, tmp_path / "run", "steps=4"), **options)
    job.ends(seconds=400)
    assert job.state["attempts"] == 1
    assert f"n2 is left out: {reason}" in job.run_log and "1 processes on n1" in job.run_log


@pytest.mark.matrix
def test_a_job_without_usable_nodes_ends(cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path):
    job = Job(cluster, recipe(method, shards, tmp_path / "run"), python="/no/python", max_restarts=0)
    job.ends("FAILED", "failed: too few nodes pass the check")
    assert "n1 is left out: " in job.run_log and "0 of 1 nodes can be used" in job.run_log


@pytest.mark.matrix
def test_four_processes_on_two_nodes(cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path):
    job = Job(cluster, recipe(method, shards, tmp_path / "run"), nodes=2, processes=2)
    job.ends()
    assert losses(job.run) == whole
    assert [rank["node"] for rank in ranks_of(job.folder / "attempt-1").values()] == ["n1", "n1", "n2", "n2"]


@pytest.mark.matrix
def test_a_job_is_stopped_and_the_same_command_goes_on(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = tmp_path / "run"
    job = Job(cluster, recipe(method, shards, run), nodes=2)
    job.trains(3)
    call("status", run)
    assert f"running on n[1-2], job {job.id}" in capsys.readouterr().out
    assert call("logs", run, "--rank", 1) == 0
    with pytest.raises(UserError, match="has no log of rank 2; write --rank 0 to 1"):
        call("logs", run, "--rank", 2)
    call("stop", run)
    job.ends(ended="stopped")
    done = last_step(run)
    assert done < STEPS and max(checkpoints(run)) == done
    assert status.of(run, {}).state == "stopped"
    again = Job(cluster, recipe(method, shards, run), nodes=2)
    assert again.id != job.id
    again.ends()
    assert losses(run) == whole


@pytest.mark.matrix
def test_a_job_that_an_operator_cancels_and_the_same_command(
    cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path
):
    """The ranks save within Slurm's KillWait, so no step is lost."""
    cfg = scored(method, shards, tmp_path / "run", "export=10")
    job = Job(cluster, cfg, nodes=2)
    job.trains(12)
    cluster.run("scancel", job.id)
    cluster.wait_for(job.id, "CANCELLED")
    done = last_step(job.run)
    assert 12 <= done < STEPS and max(checkpoints(job.run)) == done
    again = Job(cluster, cfg, nodes=2)
    again.ends()
    assert losses(again.run) == whole
    check_rows(again.run, *EXPORTS)
    assert f"resumes from step {done} " in again.run_log


@pytest.mark.matrix
def test_an_objective_of_ones_own_that_was_edited_ends_the_job(
    cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path
):
    """The file is edited while the job waits behind another one that has all nodes."""
    own = tmp_path / "own.py"
    own.write_text(method.read_text())
    words = ("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    first = cluster.run("sbatch", "--parsable", *words).stdout.strip()
    cluster.wait_for(first, "RUNNING")
    job = Job(cluster, recipe(method, shards, tmp_path / "run", f"objective={own}"))
    own.write_text(f"{method.read_text()}\n")
    cluster.run("scancel", first)
    job.ends("FAILED", f"failed: {own} has changed")
    assert last_step(job.run) == 0


@pytest.mark.matrix
def test_an_array_of_two_seeds(cluster: SlurmCluster, method: Path, shards: Path, whole: list, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(scored(method, shards, tmp_path / "run", "export=10")))
    runs = slurm.recipes(str(path), [], ["seed=0,1"])
    slurm.submit(runs, Cluster(cpus=1))
    for one in runs:
        job = job_of(Path(one.run))
        cluster.wait_for(job["id"], "COMPLETED", "FAILED", seconds=240)
        check_rows(Path(one.run), *EXPORTS)
    first, second = (losses(Path(one.run)) for one in runs)
    assert first == whole and second != whole and len(second) == STEPS


@pytest.mark.matrix
def test_restarts_without_a_further_step_end(cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path):
    options = {"max_restarts": 1, "environment": ["FAIL_AT=12"]}
    job = Job(cluster, recipe(method, shards, tmp_path / "run"), **options)
    job.ends("FAILED", "failed: 2 attempts without a further step")
    assert job.state["attempts"] == 3 and last_step(job.run) == 12  # the first one had trained
    assert "rank 0 on n1 ended with code 1 after 12 steps" in job.run_log and "step 12 fails" in job.run_log


@pytest.mark.matrix
def test_a_recipe_that_the_trainer_refuses_is_not_tried_again(
    cluster: SlurmCluster, method: Path, shards: Path, tmp_path: Path
):
    cfg = recipe(method, shards, tmp_path / "run", f"data.train={tmp_path / 'nothing'}")
    job = Job(cluster, cfg)
    job.ends("FAILED", "failed: it was refused")
    assert job.state["attempts"] == 1 and str(tmp_path / "nothing") in job.run_log


def test_a_profile_is_written_by_what_sinfo_says(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert call("launch", "--init") == 0
    text = clusters.file().read_text()
    assert "main (default): 3 nodes, 4 cores, 8 GiB, 0 GPUs, no limit" in text and "# max_restarts: 3  # " in text
    found = clusters.find("local")
    assert (found.partition, found.gpus, found.cpus, found.nodes) == ("main", 0, 4, 1)
    with pytest.raises(UserError, match="has the cluster local already"):
        call("launch", "--init")
