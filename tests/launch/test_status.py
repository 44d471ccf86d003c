"""`unlabeled status`, `logs` and `stop` for runs on this machine; tests/launch/test_slurm.py tests them for runs in
a queue."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from common import config
from common.errors import UserError
from launch import cluster_commands, job_of_run, status
from launch.file_tails import last_step
from launch.rank_records import record
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.signals import EXIT_STOPPED
from pretrain.train import train
from tests.conftest import call, tiny_recipe
from tests.faults.test_kill import wait_for
from tests.services import BUCKET, FaultProxy


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(tiny_recipe("mae", shards, folder / "finished", "eval.pixels=false"))


def commands_of_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Put scripts that stand for Slurm's commands into PATH; scancel writes what it was asked to FOLDER/asked."""
    texts = {"scontrol": "echo ClusterName = here", "scancel": f"echo $* >> {folder}/asked", **texts}
    (folder / "bin").mkdir()
    for name, text in texts.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")


@pytest.mark.slow
def test_the_table_of_a_folder_of_runs(finished: Path, capsys: pytest.CaptureFixture):
    (finished.parent / "no_run").mkdir(exist_ok=True)
    assert call("status", finished.parent) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "steps"]
    name, state, steps, left, speed, *_, checkpoint, score, restarts = row.split()
    assert (name, state, steps, left) == (str(finished), "finished", "8/8", "-")
    assert float(speed) > 0 and (checkpoint, score, restarts) == ("8", "-", "-")
    (finished / "results.jsonl").write_text(
        '{"model": "pretrained", "step": 8, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 0.25}\n'
    )
    call("status", finished)
    assert "knn 25.0% (step 8)" in capsys.readouterr().out
    unfinished = finished / "checkpoints" / ".000000009.partial"  # a save has written it, and not published it yet
    unfinished.mkdir()
    (unfinished / ".metadata").touch()
    assert status.of(finished, {}).checkpoint == "8"
    (unfinished / ".metadata").unlink()
    unfinished.rmdir()


def test_the_table_is_shown_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """With the state at that time, until Ctrl-C, and as plain lines where the output is not a terminal."""
    run, waited = tmp_path / "run", []
    shutil.copytree(finished, run)

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            raise KeyboardInterrupt
        (run / "metrics.jsonl").write_text('{"step": 2}\n')

    monkeypatch.setattr(cluster_commands.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        call("status", run, "--watch", "--seconds", 9)
    _, before, clock, _, after = capsys.readouterr().out.splitlines()
    assert " 8/8 " in before and " 3/8 " in after and waited == [9.0, 9.0]
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock)


def test_folders_without_runs_and_runs_without_logs_are_refused(finished: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds none; name one"):
        call("status", tmp_path)
    with pytest.raises(UserError, match="only jobs of a cluster have logs of ranks"):
        call("logs", finished, "--rank", 0)
    with pytest.raises(UserError, match="the run has not begun"):
        call("logs", tmp_path)
    with pytest.raises(UserError, match="no process trains it at present"):
        call("stop", finished)


def test_the_end_of_a_log(finished: Path, capsys: pytest.CaptureFixture):
    call("logs", finished, "--lines", 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "finished its 8 steps" in line


def test_runs_of_a_cluster_where_there_is_no_slurm(finished: Path, monkeypatch: pytest.MonkeyPatch):
    """For example on a workstation that has the same disk."""
    job = finished / "job.json"
    job_of_run.write_job(finished, Path("/jobs/x"), 0, "7", "local")
    monkeypatch.setenv("PATH", "")
    *_, row, note = status.table([finished])
    assert " finished " in row and note.startswith("note: the queue cannot be read here; scontrol")
    job.unlink()


def test_a_suspended_job_is_not_cancelled_without_a_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Slurm may refuse to signal it."""
    scancel = f"echo $* >> {tmp_path}/asked\n[ ! -e {tmp_path}/refuses ]"
    commands_of_slurm(tmp_path, monkeypatch, squeue="echo '7|SUSPENDED|None|n1|N/A'", scancel=scancel)
    job_of_run.write_job(finished, tmp_path, 0, "7", "here")
    assert status.stop(finished, now=False).endswith("job 7 ends after a checkpoint at the next step")
    (tmp_path / "refuses").touch()
    with pytest.raises(UserError, match=r"job 7 is suspended and cannot save a checkpoint .*; repeat the command"):
        status.stop(finished, now=False)
    assert not (tmp_path / "0" / "stop").exists()
    assert (tmp_path / "asked").read_text() == "--batch --signal=USR2 7\n" * 2
    (finished / "job.json").unlink()


def test_evaluation_jobs_are_shown_and_cancelled(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By step and state; tests/launch/test_slurm.py cancels real ones."""
    run, folder = tmp_path / "run", tmp_path / "jobs" / "run-1"
    shutil.copytree(finished, run)
    (run / "evaluations").mkdir()
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"runs": [str(run)]}))
    record(folder / "watch.json", id="90")
    row = '{"model": "pretrained", "step": 2, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 0.25}\n'
    (run / "results.jsonl").write_text(row)
    told = {"pretrained-2-val": {"id": "1"}, "pretrained-4-val": {"id": "2"}, "small-6-val": {"id": "3"}}
    told |= {"pretrained-8-val": {}, "pretrained-8-test": {"id": "5", "failed": "3 attempts failed"}}
    told |= {"pretrained-10-val": {"id": "6"}, "untrained-0-val": {"id": "7"}}
    for name, values in told.items():
        record(run / "evaluations" / f"{name}.json", attempt=1, submitted=0.0, **values)
    record(run / "evaluations" / "pretrained-10-val.end.json", attempt=1, code=1, reason="no memory")
    record(run / "evaluations" / "untrained-0-val.end.json", attempt=1, code=0, reason="")
    queue = "\n".join(f"{n}|{state}|None|n1|N/A" for n, state in ((2, "RUNNING"), (3, "PENDING"), (90, "RUNNING")))
    (tmp_path / "queue").write_text(queue + "\n")
    commands_of_slurm(tmp_path, monkeypatch, squeue=f"cat {tmp_path}/queue")
    job_of_run.write_job(run, folder, 0, "80", "here")
    *_, line = status.table([run])
    assert line == (
        f"{run}: evaluation jobs: 2 done, the last one of step 2; failed: step 8 on test (3 attempts failed); running:"
        " step 4 on val (job 2); queued: small step 6 on val (job 3); waits for sbatch: step 8 on val; will be tried"
        " again: step 10 on val (job 6)"
    )
    with pytest.raises(UserError, match="no process trains it at present"):
        status.stop(run, now=False)
    assert status.stop(run, now=True) == f"{run}: its training has ended, and its evaluations: jobs 90, 2, 3"
    assert (tmp_path / "asked").read_text().split("\n") == ["90", "2 3", ""]
    assert not (run / "evaluations" / "pretrained-4-val.json").exists()
    job_of_run.write_job(run, folder, 0, "80", "elsewhere")
    assert "submitted: step 10 on val (job 6)" in status.table([run])[-1]


def test_the_status_of_a_url(shards: Path, tmp_path: Path, proxy: FaultProxy, capsys: pytest.CaptureFixture):
    """A store holds the checkpoints of a run, and no other file of it."""
    run, url = tmp_path / "run", f"s3://{BUCKET}/status"
    train(tiny_recipe("mae", shards, run, "eval.pixels=false", f"checkpoint.folder={url}", "steps=3"))
    assert call("status", url) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row == [url, "checkpoints", "of", str(run), "3/3", "-", "-", "-", "3", "-", "-"]
    with pytest.raises(UserError, match="holds no checkpoint; a store has only the checkpoints of a run"):
        call("status", f"s3://{BUCKET}/elsewhere")


def test_the_newest_checkpoint_is_found_where_the_recipe_says(finished: Path, tmp_path: Path):
    run = shutil.copytree(finished, tmp_path / "run")
    assert status.of(run, {}).checkpoint == "8"
    recipe = (run / "recipe.yaml").read_text()
    for folder, shown in ((tmp_path / "elsewhere", "8"), (tmp_path / "empty", "-"), ("s3://bucket/run", "in a store")):
        (run / "recipe.yaml").write_text(recipe.replace("folder: ''", f"folder: {folder}", 1))
        if (run / "checkpoints").is_dir():
            (run / "checkpoints").rename(tmp_path / "elsewhere")
        assert status.of(run, {}).checkpoint == shown


@pytest.mark.slow
def test_a_run_on_this_machine_is_followed_and_stopped(shards: Path, tmp_path: Path):
    """The run ends after a checkpoint, as after Ctrl-C, and so does the command that follows its log."""
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    options = ("steps=100000", "checkpoint=100000", "eval.pixels=false")
    path.write_text(config.dump(tiny_recipe("mae", shards, run, *options)))
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", "train", str(path)], stdout=subprocess.DEVNULL)
    assert wait_for(lambda: last_step(run) > 3, process)
    seen: list[str] = []
    follower = threading.Thread(target=status.follow, args=(run / "log.txt", run, seen.append, 0.05))
    follower.start()
    _, row = status.table([run])
    assert f"process {process.pid}" in row and "running on" in row and row.split()[-1] == "-"
    assert call("stop", run) == 0
    assert process.wait(120) == EXIT_STOPPED
    follower.join(60)
    assert not follower.is_alive() and any("stopped as asked, after a checkpoint" in line for line in seen)
    assert int(max(complete_checkpoints(run)).name) == last_step(run)
    assert status.of(run, {}).state == "stopped"


@pytest.mark.slow
def test_a_run_on_this_machine_is_ended_at_once(shards: Path, tmp_path: Path):
    """Neither its trainers nor its scoring process go on, and no checkpoint is written."""
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    options = ("steps=100000", "checkpoint=100000", "eval.pixels=false", "parallel.mode=ddp", f"eval.val={shards}")
    path.write_text(
        config.dump(tiny_recipe("mae", shards, run, *options, f"eval.gallery={shards}", "eval.quick=[knn]"))
    )
    command = [sys.executable, "-m", "launch.cli", "train", str(path), "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    assert wait_for(lambda: last_step(run) > 3, process)
    children = psutil.Process(process.pid).children()
    assert len(children) == 3
    assert call("stop", run, "--now") == 0
    assert process.wait(60) == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] and not complete_checkpoints(run)
    assert "stopped as asked" not in (run / "log.txt").read_text()
