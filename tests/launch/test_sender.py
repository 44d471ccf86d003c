"""The processes that send a run to a tracker, with a tracker of the tests' own instead of a package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from launch import evaluation_jobs, local
from pretrain.recipes.recipe import load
from pretrain.run_folder.prepare import prepare
from pretrain.signals import EXIT_STOPPED
from pretrain.trackers import sender, trackers, tracking
from tests.conftest import tiny_recipe
from tests.launch import own_tracker

ROOT = Path(__file__).parents[2]
WORDS = ("eval.pixels=false", "log.trackers=[mlflow]")


@pytest.fixture
def run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with 30 writes of metrics, whose tracker `mlflow` is `own_tracker`."""
    monkeypatch.setattr(trackers, "find", lambda name: SimpleNamespace(Run=own_tracker.Run, PACKAGES=()))
    monkeypatch.setattr(tracking, "SENDER", "tests.launch.own_tracker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = prepare(tiny_recipe("mae", shards, tmp_path / "run", *WORDS))
    write(run, range(30))
    return run


def write(run: Path, steps: range) -> None:
    values = {f"v{n}": 0.5 for n in range(299)}
    rows = [{"step": step, **values, "samples_per_second": 1.0} for step in steps]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def in_process(run: Path) -> sender.Sender:
    recipe = load(run)
    (folder := run / "trackers" / "mlflow").mkdir(parents=True, exist_ok=True)
    return sender.Sender(run, recipe, recipe.log.trackers[0], folder, sender.Ending())


def process(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", tracking.SENDER, str(run), "mlflow"]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def stored(run: Path) -> list[dict]:
    path = run / "trackers" / "mlflow" / "stored.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(run: Path) -> list[int]:
    return [row["step"] for row in stored(run) if "step" in row]


def wait_for(condition: Iterator[bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not next(condition):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_disk_on_which_the_state_cannot_be_written(run: Path):
    one = in_process(run)
    one.read()
    state = one.folder / "state.json"
    state.mkdir()  # the file cannot be written
    (run / ".run.json").rename(run / "moved")  # nor can the identity of the run be read
    one.send()
    assert steps(run) == [*range(30)] and not one.failed
    state.rmdir()
    (run / "moved").rename(run / ".run.json")
    assert one.finish() == 0 and json.loads(state.read_text())["step"] == 29


@pytest.mark.slow
def test_a_process_that_is_killed_repeats_one_request(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(own_tracker.SECONDS, "0.3")
    first = process(run)
    wait_for(iter(lambda: len(steps(run)) >= 6, None))
    first.kill()
    first.wait()
    monkeypatch.setenv(own_tracker.SECONDS, "0")
    with process(run) as second:
        second.stdin.write(b"stopped 60\n")
    assert second.returncode == 0 and stored(run)[-1] == {"outcome": "stopped"}
    counts = Counter(steps(run))
    assert [*counts] == [*range(30)] and sum(counts.values()) <= 33  # a request has 3 steps


@pytest.mark.slow
def test_a_process_whose_parent_was_killed(run: Path, monkeypatch: pytest.MonkeyPatch):
    with process(run) as one:
        pass  # closes its standard input without a word
    assert one.returncode == 0 and stored(run)[-1] == {"outcome": "failed"}
    write(run, range(30, 31))
    monkeypatch.setenv(own_tracker.SECONDS, "1000")
    monkeypatch.setenv(own_tracker.LAST_SECONDS, "1")
    with process(run) as one:
        pass
    assert one.returncode == sender.EXIT_UNSENT


def test_scores_that_come_after_the_end_do_not_change_how_the_run_has_ended(run: Path):
    with process(run) as one:
        one.stdin.write(b"failed 60\n")
    score = {"model": "export/29", "step": 29, "split": "val", "protocol": "knn", "metric": "accuracy", "value": 0.5}
    (run / "results.jsonl").write_text(json.dumps(score) + "\n")
    evaluation_jobs._send_scores(run)
    *_, before, sent, after = stored(run)
    assert before == after == {"outcome": "failed"} and sent["step"] == 29


@pytest.mark.parametrize(("exit_code", "outcome"), [(EXIT_STOPPED, "stopped"), (3, "failed")])
def test_a_launcher_whose_trainers_do_not_finish(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, outcome: str
):
    """Its two trainers are processes that end with the exit code at once; they start no senders of their own."""
    monkeypatch.setattr(tracking, "ABORT_SECONDS", 59.0)  # of a busy machine
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.0)
    ended = [sys.executable, "-c", f"raise SystemExit({exit_code})"]
    monkeypatch.setattr(local, "_start_module", lambda *_, **__: subprocess.Popen(ended))
    recipe = tiny_recipe("mae", shards, run, *WORDS, "parallel.mode=ddp")
    assert local.train(recipe, processes=2) == exit_code
    assert steps(run) == [*range(30)] and stored(run)[-1] == {"outcome": outcome}


def test_a_sender_that_cannot_be_started_or_hangs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    recipe = load(run)
    monkeypatch.setattr(tracking, "ABORT_SECONDS", 0.0)
    with monkeypatch.context() as patch, tracking.Tracking(recipe) as one:
        patch.setattr(sys, "executable", "/no/such/python")
        one.start(run)
    assert "tracker mlflow: the process that sends to it cannot be started (No such file" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt), tracking.Tracking(recipe) as one:
        one.start(run)
        (child,) = one._processes.values()
        raise KeyboardInterrupt
    assert child.returncode == -signal.SIGKILL
    assert "tracker mlflow: it did not take the rest in time" in capfd.readouterr().err


class Refusing(own_tracker.Run):
    """Refuses the steps 4 and 5; while `off` exists, everything."""

    def log(self, rows: list) -> None:
        if (self.path.parent / "off").exists() or any(step in (4, 5) for step, _ in rows):
            raise ValueError("not allowed")
        super().log(rows)


def test_entries_that_the_tracker_refuses_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trackers, "find", lambda name: SimpleNamespace(Run=Refusing))
    one = in_process(run)
    (off := one.folder / "off").touch()
    one.read()
    for _ in range(5):  # nothing is left out while nothing is accepted
        one.send(now=True)
    assert len(one.waiting) == 30
    off.unlink()
    for _ in range(8):
        one.send(now=True)
    assert steps(run) == [n for n in range(30) if n not in (4, 5)]
    log = (run / "log.txt").read_text()
    assert log.count("of step 4, which is left out: ValueError: not allowed") == 1 and log.count("left out") == 2
    assert json.loads((one.folder / "state.json").read_text())["step"] == 29


class Forgetful(own_tracker.Run):
    """Has no run of an earlier process, and does not take settings."""

    def __init__(self, options: object, folder: Path, run_id: str):
        if run_id:
            raise trackers.UnknownRun("there is no such run")
        super().__init__(options, folder, "2")

    def add_settings(self, settings: dict) -> None:
        raise ValueError("too long")


def test_a_run_that_the_tracker_does_not_have_is_sent_to_a_new_one(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert in_process(run).finish() == 0
    monkeypatch.setattr(trackers, "find", lambda name: SimpleNamespace(Run=Forgetful))
    write(run, range(30, 32))
    one = in_process(run)
    assert one.finish() == 0 and one.state["id"] == "2"
    assert steps(run) == [*range(30), *range(32)]
    assert "ValueError: too long" in (run / "log.txt").read_text()


def test_an_overwritten_run_is_a_new_run_of_the_tracker(run: Path, shards: Path):
    one = in_process(run)
    told = {"run": "another", "id": "7", "step": 3, "scores": 1}
    (one.folder / "state.json").write_text(json.dumps(told))
    one = in_process(run)
    assert one.state == {"run": one.identity, "id": "", "step": -1, "scores": 0, "outcome": "finished"}
    prepare(tiny_recipe("mae", shards, run, *WORDS, "overwrite=true"))
    assert not (run / "trackers").exists()
    os.makedirs(one.folder)
    write(run, range(1))
    one.read()
    with pytest.raises(UserError, match="was overwritten"):
        one.send()
