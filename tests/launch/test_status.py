"""`unlabeled status`, `logs` and `stop` for runs on this machine; tests/launch/test_slurm.py tests them for runs in
a queue."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import config
from common.errors import UserError
from launch import run_jobs, status
from launch.run_tail import last_step
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.signals import EXIT_STOPPED
from pretrain.train import train
from tests.conftest import call, tiny_recipe
from tests.faults.test_kill import wait_for


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(tiny_recipe("mae", shards, folder / "finished", "eval.pixels=false"))


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
    run_jobs.write_job(finished, Path("/jobs/x"), 0, "7", "local")
    monkeypatch.setenv("PATH", "")
    *_, row, note = status.table([finished])
    assert " finished " in row and note.startswith("note: the queue cannot be read here; scontrol")
    job.unlink()


def test_a_suspended_job_is_not_cancelled_without_a_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Slurm may refuse to signal it."""
    texts = {"scontrol": "echo ClusterName = here", "squeue": "echo '7|SUSPENDED|None|n1|N/A'"}
    texts["scancel"] = f"echo $* >> {tmp_path}/asked\n[ ! -e {tmp_path}/refuses ]"
    (tmp_path / "bin").mkdir()
    for name, text in texts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    run_jobs.write_job(finished, tmp_path, 0, "7", "here")
    assert status.stop(finished, now=False).endswith("job 7 ends after a checkpoint at the next step")
    (tmp_path / "refuses").touch()
    with pytest.raises(UserError, match=r"job 7 is suspended and cannot save a checkpoint .*; repeat the command"):
        status.stop(finished, now=False)
    assert not (tmp_path / "0" / "stop").exists()
    assert (tmp_path / "asked").read_text() == "--batch --signal=USR2 7\n" * 2
    (finished / "job.json").unlink()


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
