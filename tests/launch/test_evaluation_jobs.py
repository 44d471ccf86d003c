"""What the watcher of evaluation jobs does when Slurm does not answer, refuses, or loses a job: a real cluster cannot be
made to do so, and the commands of Slurm are scripts. tests/launch/test_slurm.py tests it with a real one."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from common import config
from common.errors import UserError
from launch import evaluation_jobs, evaluation_states, job_of_run, status, watch
from launch.clusters import Cluster
from launch.rank_records import read_record, record
from pretrain.recipes.recipe import load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.marker import run_identity, update_marker
from pretrain.run_folder.recipe_file import write_recipe
from pretrain.run_folder.run_lock import living_holder
from pretrain.run_folder.written_files import RUN_FILES, delete_files
from pretrain.signals import EXIT_STOPPED, EXIT_UNSCORED
from tests.faults.test_kill import wait_for

NAME = "pretrained-5-val"
SQUEUE = """#!/bin/sh
[ ! -e {folder}/queue ] || cat {folder}/queue
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
    for name, value in (("ASK_SECONDS", 0.3), ("POLL", 0.05), ("REFUSED_SECONDS", 0.1), ("MAX_REFUSALS", 4)):
        monkeypatch.setattr(evaluation_jobs, name, value)
    return scene


def later(seconds: float, do: object) -> None:
    threading.Timer(seconds, do).start()  # type: ignore[arg-type]


def when(condition: Callable[[], object], do: Callable[[], object]) -> None:
    """Call `do` in a thread as soon as `condition` holds."""

    def wait() -> None:
        while not condition():
            time.sleep(0.02)
        do()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("known", [{"id": "7"}, {}])
def test_a_watcher_that_starts_again_submits_no_second_job(scene: Scene, known: dict):
    """Also if it was killed before it had recorded the id."""
    record(scene.records / f"{NAME}.json", attempt=1, submitted=time.time() - 60, **known)
    scene.queue(NAME, attempt=1)
    later(1.0, lambda: scene.ends(NAME, 1))
    assert evaluation_jobs.watch(scene.job) == 0
    assert scene.submitted == 0 and scene.record()["attempt"] == 1


@pytest.mark.slow
def test_refusals_fail_no_evaluation_while_a_job_runs(scene: Scene):
    """The limit of jobs of a user may be the reason, so sbatch is asked again when that job has ended."""
    scene.export(6)
    record(scene.records / f"{NAME}.json", attempt=1, submitted=time.time() - 60, id="7")
    scene.queue(NAME, attempt=1)
    (scene.folder / "refusal").write_text("QOSMaxSubmitJobPerUserLimit")

    second = "pretrained-6-val"

    def end() -> None:
        refused = scene.submitted
        scene.ends(NAME, 1)
        (scene.folder / "queue").unlink()
        when(lambda: scene.submitted > refused, (scene.folder / "refusal").unlink)
        when(lambda: scene.record(second).get("id"), lambda: scene.ends(second, 1))

    when(lambda: scene.submitted >= 2, end)
    assert evaluation_jobs.watch(scene.job) == 0
    assert scene.record(second)["id"] == "7"


@pytest.mark.slow
def test_what_sbatch_says_again_and_again_is_logged_once(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """And again when it says something else; the same for the failure before."""
    monkeypatch.setattr(evaluation_jobs, "MAX_REFUSALS", 8)
    record(scene.records / f"{NAME}.json", attempt=1, submitted=time.time() - 60, id="7")
    record(scene.records / f"{NAME}.end.json", attempt=1, code=1, reason="no memory")
    (scene.folder / "refusal").write_text("first")
    when(lambda: scene.submitted >= 4, lambda: (scene.folder / "refusal").write_text("second"))
    assert evaluation_jobs.watch(scene.job) == EXIT_UNSCORED
    log = (scene.run / "log.txt").read_text()
    assert log.count("is tried again: no memory") == 1
    waits = [line for line in log.splitlines() if "evaluations wait: sbatch refuses the job: " in line]
    assert len(waits) == 2 and "first" in waits[0] and "second" in waits[1]


@pytest.mark.slow
def test_a_job_that_sbatch_has_queued_although_it_timed_out_is_found(scene: Scene):
    (scene.folder / "refusal").write_text("Socket timed out on send/recv operation")
    scene.queue(NAME, attempt=1)
    when(lambda: scene.submitted, lambda: later(1.5, lambda: scene.ends(NAME, 1)))  # time for a second one
    assert evaluation_jobs.watch(scene.job) == 0
    assert scene.submitted == 1 and scene.record()["attempt"] == 1


def test_a_profile_of_which_no_script_can_be_made_fails_the_evaluations(scene: Scene):
    scene.write_profile(cpus=None, gpus=1)  # and there is no sinfo
    (scene.folder / "bin" / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    (scene.folder / "bin" / "sinfo").chmod(0o755)
    assert evaluation_jobs.watch(scene.job) == EXIT_UNSCORED
    assert "cpus is not given, and sinfo" in scene.record()["failed"] and scene.submitted == 0


def test_the_watcher_and_a_job_of_a_run_that_was_overwritten_leave_the_new_one_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
):
    watcher = evaluation_jobs.Watcher(scene.run, scene.job, Cluster(cpus=1))
    assert watcher.look(True, {}, 0.0) and scene.submitted == 1
    former = watcher.identity
    update_marker(scene.run, id="f" * 32)
    assert not watcher.look(True, {}, 0.0) and living_holder(scene.records) is None
    monkeypatch.setattr(watch, "by_protocol", lambda *_: pytest.fail("it was evaluated"))
    export = str(scene.run / "export" / "5")
    with pytest.raises(UserError, match="was overwritten"):
        watch.evaluate_one(scene.run, export, 5, "val", former)

    def knn() -> list[dict]:
        update_marker(scene.run, id="0" * 32)
        return [{"model": "pretrained", "step": 5, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 1}]

    monkeypatch.setattr(watch, "by_protocol", lambda *_: [("knn", knn)])
    with pytest.raises(UserError, match="was overwritten"):
        watch.evaluate_one(scene.run, export, 5, "val", "f" * 32)
    assert not (scene.run / "results.jsonl").exists()
    (scene.folder / "bin" / "scontrol").write_text("#!/bin/sh\necho n1\n")
    (scene.folder / "bin" / "srun").write_text("#!/bin/sh\nexit 0\n")
    for name in ("scontrol", "srun"):
        (scene.folder / "bin" / name).chmod(0o755)
    for name, value in (("SLURM_JOB_NODELIST", "n1"), ("SLURM_JOB_CPUS_PER_NODE", "1")):
        monkeypatch.setenv(name, value)
    for identity, written in ((former, False), ("0" * 32, True)):
        with pytest.raises(SystemExit):
            evaluation_jobs.evaluation_job(str(scene.job), str(scene.run), identity, export, "5", "val", "1")
        assert (scene.records / f"{NAME}.end.json").exists() == written


def test_a_watcher_that_another_one_has_replaced_submits_nothing(scene: Scene):
    watcher = evaluation_jobs.Watcher(scene.run, scene.job, Cluster(cpus=1))
    assert watcher._locked() and watcher.lock is not None
    watcher.lock.taken_over = True
    assert watcher.look(True, {}, 0.0) and scene.submitted == 0
    watcher.release()


def test_evaluations_that_were_cancelled_are_not_submitted_again(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """By the watcher, which goes on for another run of the same array, until the run is launched again."""
    job_of_run.write_job(scene.run, scene.job, 0, "80", "here")
    watcher = evaluation_jobs.Watcher(scene.run, scene.job, Cluster(cpus=1))
    assert watcher.look(True, {}, 0.0) and scene.submitted == 1
    queue, cancel = scene.folder / "queue", scene.folder / "bin" / "scancel"
    queue.write_text("7|RUNNING|None|n1|N/A\n")
    cancel.write_text("#!/bin/sh\necho scancel: error: the controller is down >&2\nexit 1\n")
    cancel.chmod(0o755)
    with pytest.raises(
        UserError, match=r"^job 80 is cancelled, but not all of its evaluations \(scancel 7: failed: .*down"
    ):
        status._cancel_evaluations(scene.run, "job 80 is cancelled")
    cancel.write_text(f"#!/bin/sh\nrm {queue}\necho scancel: error: Kill job error: Invalid job id >&2\nexit 1\n")
    assert evaluation_states.cancel(scene.run) == ["7"]  # it has ended in the meantime
    assert not watcher.look(True, {}, 0.0) and not watcher.look(True, {}, 0.0) and scene.submitted == 1
    assert living_holder(scene.records) is None and watcher.names() == []
    evaluation_states.resume(scene.run)
    assert watcher.look(True, {}, 0.0) and scene.submitted == 2
    watcher.release()
    evaluation_states.cancel(scene.run)
    delete_files(scene.run, RUN_FILES)
    assert not scene.records.exists()


def test_a_line_of_the_log_is_masked(scene: Scene):
    evaluation_jobs.Watcher(scene.run, scene.job, Cluster()).say("failed: s3://me:secret@host/x\x1b[2J")
    log = (scene.run / "log.txt").read_text()
    assert log.endswith("failed: s3://***@host/x\\x1b[2J\n")


def test_only_records_of_evaluations_are_deleted(scene: Scene):
    """Others may keep files in RUN/evaluations/, too. What ended without a row is tried again in any order of names."""
    records = {
        f"{model}-{step}-{split}" for model in ("pretrained", "a.b") for step in (0, 5) for split in ("val", "test")
    }
    for number, name in enumerate(sorted(records)):
        first, second = (".json", ".end.json") if number % 2 else (".end.json", ".json")
        for end in (first, second):
            (scene.records / f"{name}{end}").write_text('{"attempt": 1, "code": 0}')
    (scene.records / "failed-7-val.json").write_text('{"failed": "x"}')
    (scene.records / "running-7-val.json").write_text('{"attempt": 1}')
    others = {"mine.json": '{"failed": "x"}', "mine.end.json": "{}", "5-val.json": "[]", "table.partial": ""}
    for name, text in others.items():
        (scene.records / name).write_text(text)
    evaluation_jobs._forget_ended(scene.run)
    assert evaluation_jobs.failed(scene.run) == []
    assert {path.name for path in scene.records.iterdir()} == {*others, "running-7-val.json"}
    for name in (".run.lock", f"{NAME}.json", f"{NAME}.end.json", f"{NAME}.partial", f"{NAME}.end.partial"):
        (scene.records / name).touch()
    delete_files(scene.run, RUN_FILES)
    assert {path.name for path in scene.records.iterdir()} == {*others}


WATCH_JOB = """
import sys
from launch import evaluation_jobs, slurm_client
slurm_client.time.sleep = lambda seconds, sleep=slurm_client.time.sleep: sleep(min(seconds, 0.2))
evaluation_jobs.watch_job(sys.argv[1])
"""


@pytest.mark.slow
def test_a_watcher_that_is_requeued_releases_its_locks(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """And its job asks again if the controller does not answer."""
    record(scene.records / f"{NAME}.json", attempt=1, submitted=time.time() - 60, id="7")
    scene.queue(NAME, attempt=1)
    requeue = scene.folder / "bin" / "scontrol"
    requeue.write_text(f"#!/bin/sh\necho $* >> {scene.folder}/asked\n[ $(wc -l < {scene.folder}/asked) -ge 3 ]\n")
    requeue.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    job = subprocess.Popen([sys.executable, "-c", WATCH_JOB, str(scene.job)])
    assert wait_for(lambda: living_holder(scene.records) is not None, job)
    job.send_signal(signal.SIGUSR2)
    assert job.wait(30) == EXIT_STOPPED and not (scene.records / ".run.lock").exists()
    assert (scene.folder / "asked").read_text() == "requeue 9\n" * 3


def test_a_file_system_that_fails_for_a_moment_does_not_end_the_watcher(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    failures = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ESTALE, "Stale file handle")]

    def fails_first(path: Path, **values: object) -> None:
        if failures:
            raise failures.pop()
        record(path, **values)
        scene.ends(NAME, 1)

    monkeypatch.setattr(evaluation_jobs, "record", fails_first)
    assert evaluation_jobs.watch(scene.job) == 0 and not failures and scene.submitted == 1


def test_rows_are_written_after_everything_else_of_an_evaluation(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """An evaluation that fails in between leaves no rows, with which it would count as complete."""
    row = {"model": "pretrained", "step": 5, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 0.5}
    recipe = load("demo", [f"run={scene.run}", "eval.val=[shards]", "eval.gallery=[shards]", "eval.prompts=[Once]"])
    write_recipe(recipe, scene.run)
    export, identity = str(scene.run / "export" / "5"), run_identity(scene.run)["id"]
    monkeypatch.setattr(watch, "by_protocol", lambda *_: [("knn", lambda: [row])])
    cards: list[Path] = []
    monkeypatch.setattr(watch.model_card, "write", cards.append)
    fails = [True, True]

    def samples(*_: object) -> list[dict]:
        if fails.pop():
            raise RuntimeError("no memory")
        return [{"step": 5, "prompt": "Once", "text": " upon"}]

    monkeypatch.setattr(watch, "samples", samples)
    with pytest.raises(RuntimeError, match="no memory"):
        watch.evaluate_one(scene.run, export, 5, "val", identity)
    assert not (scene.run / "results.jsonl").exists()
    fails[:] = [False, False]
    with monkeypatch.context() as patch:
        patch.setattr(watch.results, "append_new", fails_for("results.jsonl"))
        with pytest.raises(UserError, match="disk is full"):
            watch.evaluate_one(scene.run, export, 5, "val", identity)
    watch.evaluate_one(scene.run, export, 5, "val", identity)
    assert [*map(len, (read_rows(scene.run / "results.jsonl"), read_rows(scene.run / "samples.jsonl"), cards))] == [
        1
    ] * 3
    watch.evaluate_one(scene.run, export, 5, "val", identity)  # whose process may have ended before the card
    assert len(cards) == 2 and len(read_rows(scene.run / "results.jsonl")) == 1


def test_a_protocol_that_fails_does_not_keep_the_others_from_their_rows(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """And they are not computed again when it is tried again."""
    recipe = load("demo", [f"run={scene.run}", "eval.val=[a]", "eval.gallery=[a]", "eval.quick=[knn,linear,fewshot]"])
    write_recipe(recipe, scene.run)
    export, identity = str(scene.run / "export" / "5"), run_identity(scene.run)["id"]
    monkeypatch.setattr(watch.model_card, "write", lambda folder: None)
    asked: list[list[str]] = []
    works = False

    def scores(name: str) -> list[dict]:
        if name == "linear" and not works:
            raise UserError("no memory")
        return [{"model": "pretrained", "step": 5, "protocol": name, "split": "val", "metric": "accuracy", "value": 1}]

    def by_protocol(model: str, names: list[str], *_: object) -> list[tuple]:
        asked.append(names)
        return [(name, partial(scores, name)) for name in names]

    monkeypatch.setattr(watch, "by_protocol", by_protocol)
    with pytest.raises(UserError, match="no memory"):
        watch.evaluate_one(scene.run, export, 5, "val", identity)
    assert [row["protocol"] for row in read_rows(scene.run / "results.jsonl")] == ["knn", "fewshot"]
    works = True
    watch.evaluate_one(scene.run, export, 5, "val", identity)
    watch.evaluate_one(scene.run, export, 5, "val", identity)
    assert asked == [["knn", "linear", "fewshot"], ["linear"]]
    assert [row["protocol"] for row in read_rows(scene.run / "results.jsonl")] == ["knn", "fewshot", "linear"]


def test_an_evaluation_in_which_the_process_dies_twice_is_left_out(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    scene.export(10)
    died: list[int] = []

    def score(run: Path, recipe: object, model: str, step: int, *_: object) -> list:
        if step == 5:
            died.append(step)
            raise KeyboardInterrupt  # as if the process ended here
        rows = [
            {"model": "pretrained", "step": step, "protocol": "knn", "split": "val", "metric": "accuracy", "value": 1}
        ]
        watch.results.append(run / "results.jsonl", rows)
        return []

    monkeypatch.setattr(watch, "score", score)
    monkeypatch.setattr(watch.child_signals, "input_closed", lambda wait: True)
    monkeypatch.setattr(watch, "_end", lambda *_: None)  # a process that dies records nothing
    for _ in range(watch.MAX_DEATHS):
        with pytest.raises(KeyboardInterrupt):
            watch.watch(scene.run)
    assert watch.watch(scene.run) == EXIT_UNSCORED and len(died) == watch.MAX_DEATHS
    assert [row["step"] for row in read_rows(scene.run / "results.jsonl")] == [10]
    assert (
        "on val failed: the scoring process died 2 times while it was computed" in (scene.run / "log.txt").read_text()
    )


def fails_for(name: str) -> Callable[..., bool]:
    append_new = watch.results.append_new

    def fails(path: Path, *arguments: object) -> bool:
        if path.name == name:
            raise UserError("the disk is full")
        return append_new(path, *arguments)  # type: ignore[arg-type]

    return fails


def test_rows_are_written_all_or_none(tmp_path: Path):
    path, rows = tmp_path / "results.jsonl", [{"step": 1, "text": "x" * 50}] * 2
    watch.results.append(path, rows)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for space in (100, 0):  # in bytes: one row, and none
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + space, hard))
        try:
            with pytest.raises(UserError, match=r"results.jsonl: scores cannot be written"):
                watch.results.append(path, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before


def test_a_folder_of_a_job_without_a_profile_for_evaluations_is_refused(scene: Scene):
    with pytest.raises(UserError, match=r"run/job.json: is missing or damaged; name the folder of a job"):
        evaluation_jobs.watch(scene.run)
    (line,) = evaluation_jobs.submit_watcher(scene.run)  # jobs that are queued already stay as they are
    assert line.startswith("exports are not evaluated: ") and scene.submitted == 0
    (scene.job / "job.json").write_text(json.dumps({"runs": [str(scene.run)], "evaluation": None}))
    with pytest.raises(UserError, match="has no profile for evaluation jobs"):
        evaluation_jobs.watch(scene.job)
