"""What the watcher of evaluation jobs does when Slurm does not answer, refuses, or loses a job: a real cluster cannot be
made to do so, and the commands of Slurm are scripts. tests/launch/test_slurm.py tests it with a real one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from common import config
from launch import evaluation_jobs
from launch.clusters import Cluster
from launch.rank_records import read_record, record
from pretrain.recipes.recipe import load
from pretrain.run_folder.recipe_file import write_recipe
from pretrain.signals import EXIT_UNSCORED

NAME = "pretrained-5-val"
SQUEUE = """#!/bin/sh
cat {folder}/queue 2> /dev/null
"""
SBATCH = """#!/bin/sh
echo >> {folder}/submitted
[ -e {folder}/refusal ] && cat {folder}/refusal >&2 && exit 1
echo Submitted batch job 7
"""


class Scene:
    """A run that has ended, of which exports are to be evaluated, and the scripts that stand for Slurm."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.job = folder, folder / "run", folder / "jobs" / "run-1"
        (folder / "bin").mkdir()
        for name, text in (("squeue", SQUEUE), ("sbatch", SBATCH)):
            (folder / "bin" / name).write_text(text.format(folder=folder))
            (folder / "bin" / name).chmod(0o755)
        self.records = self.run / "evaluations"
        self.records.mkdir(parents=True)
        self.job.mkdir(parents=True)
        write_recipe(load("demo", [f"run={self.run}", "eval.val=[shards]", "eval.gallery=[shards]"]), self.run)
        self.export(5)
        self.write_profile()

    def export(self, step: int) -> None:
        (self.run / "export" / str(step)).mkdir(parents=True)
        (self.run / "export" / str(step) / "config.json").write_text("{}")

    def write_profile(self, **options: object) -> None:
        profile = config.to_dict(Cluster(cpus=1).replace(**options))
        (self.job / "job.json").write_text(json.dumps({"runs": [str(self.run)], "evaluation": profile}))

    def queue(self, name: str, attempt: int, state: str = "RUNNING") -> None:
        """Let squeue list the job of an attempt from now on."""
        inode = self.records.stat().st_ino
        (self.folder / "queue").write_text(f"7|{state}|None|n1|N/A|run-{name}-{inode}-{attempt}\n")

    @property
    def submitted(self) -> int:
        """How often sbatch was called."""
        path = self.folder / "submitted"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def ends(self, name: str, attempt: int) -> None:
        """Record that the job of an attempt has evaluated its export."""
        record(self.records / f"{name}.end.json", attempt=attempt, code=0, reason="")

    def record(self, name: str = NAME) -> dict:
        return read_record(self.records / f"{name}.json")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    scene = Scene(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name, value in (("ASK_SECONDS", 0.3), ("POLL", 0.05), ("REFUSED_SECONDS", 0.0), ("MAX_REFUSALS", 2)):
        monkeypatch.setattr(evaluation_jobs, name, value)
    return scene


def later(seconds: float, do: object) -> None:
    threading.Timer(seconds, do).start()  # type: ignore[arg-type]


@pytest.mark.parametrize("known", [{"id": "7"}, {}])
def test_a_watcher_that_starts_again_submits_no_second_job(scene: Scene, known: dict):
    """Also if it was killed before it had recorded the id."""
    record(scene.records / f"{NAME}.json", attempt=1, submitted=time.time() - 60, **known)
    scene.queue(NAME, attempt=1)
    later(1.0, lambda: scene.ends(NAME, 1))
    assert evaluation_jobs.watch(scene.job) == 0
    assert scene.submitted == 0 and scene.record()["attempt"] == 1


def test_refusals_fail_no_evaluation_while_a_job_runs(scene: Scene):
    """The limit of jobs of a user may be the reason."""
    scene.export(6)
    record(scene.records / f"{NAME}.json", attempt=1, submitted=time.time() - 60, id="7")
    scene.queue(NAME, attempt=1)
    (scene.folder / "refusal").write_text("QOSMaxSubmitJobPerUserLimit")

    def end() -> None:
        assert scene.submitted >= 2 and evaluation_jobs.failed(scene.run) == []
        scene.ends(NAME, 1)
        scene.ends("pretrained-6-val", 1)

    later(2.5, end)
    assert evaluation_jobs.watch(scene.job) == 0


def test_a_job_that_sbatch_has_queued_although_it_timed_out_is_found(scene: Scene):
    (scene.folder / "refusal").write_text("Socket timed out on send/recv operation")
    scene.queue(NAME, attempt=1)
    later(1.5, lambda: scene.ends(NAME, 1))
    assert evaluation_jobs.watch(scene.job) == 0
    assert scene.submitted == 1 and scene.record()["attempt"] == 1


def test_a_profile_of_which_no_script_can_be_made_fails_the_evaluations(scene: Scene):
    scene.write_profile(cpus=None, gpus=1)  # and there is no sinfo
    (scene.folder / "bin" / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    (scene.folder / "bin" / "sinfo").chmod(0o755)
    assert evaluation_jobs.watch(scene.job) == EXIT_UNSCORED
    assert "cpus is not given, and sinfo" in scene.record()["failed"] and scene.submitted == 0
