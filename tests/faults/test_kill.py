"""kill -9 of a training at a random moment, then the same command again: the losses are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import config
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.run_folder.run_lock import Lock
from pretrain.train import EXIT_STOPPED, train
from tests.conftest import sampled, tiny_recipe, trainer, unlabeled
from tests.faults import killer
from tests.forked import Forked


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").is_file() else []
    return [json.loads(line) for line in lines if line]


def recipe_file(shards: Path, run: Path, name: str = "mae", steps: int = 120) -> Path:
    path = run.with_suffix(".yaml")
    options = (f"steps={steps}", "checkpoint=7", "data.workers=1", "export=50", "eval.pixels=false")
    path.write_text(config.dump(tiny_recipe(name, shards, run, *options)))
    return path


def start(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "train", str(path)], start_new_session=True, stdout=subprocess.DEVNULL
    )


def trainer_of(process: subprocess.Popen) -> int | None:
    """The id of the trainer's process, a child of the command that started it; None if it does not exist yet."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next((int(c) for c in children if b"pretrain.train" in Path(f"/proc/{c}/cmdline").read_bytes()), None)


def wait_for(condition, process: subprocess.Popen) -> bool:
    """Wait until the condition holds (True) or the process has ended (False)."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(["mae", "simclr", "dinov2"], "dinov2"))
def test_killed_at_random_steps(name: str, shards: Path, tmp_path: Path):
    """First the trainer that the command has started is killed, then two trainers that the test has started."""
    whole = train(tiny_recipe(name, shards, tmp_path / "whole", "steps=60", "checkpoint=1000"))
    run = tmp_path / "killed"
    path = recipe_file(shards, run, name, steps=60)
    kills = 0
    for n, step in enumerate(sorted(random.sample(range(5, 50), 3))):
        process = start(path) if n == 0 else Forked(killer.run, [str(path)], output=(os.devnull, os.devnull))
        there = (lambda own=process: trainer_of(own)) if n == 0 else (lambda own=process: own.pid)
        # the rows of the one before may be as many already
        if wait_for(lambda step=step, there=there: len(rows(run)) > step and there(), process):
            os.kill(there(), signal.SIGKILL)
            kills += 1
        assert process.wait() != 0
    done = unlabeled("train", path)
    assert done.returncode == 0 and kills == 3, done.stderr
    assert [(r["step"], r["loss"]) for r in rows(run)] == [(r["step"], r["loss"]) for r in rows(whole)]
    assert (run / "export" / "60" / "config.json").is_file() and not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["clip", "videomae", "bestrq"])
def test_each_modality_resumes_after_a_kill(name: str, shards: Path, tmp_path: Path):
    """Captions, clips and recordings are drawn again as in an undisturbed run: which caption of an image, the beginning
    of a clip, the spans of a recording."""
    options = ("steps=40", "checkpoint=6", "data.workers=1", "eval.pixels=false")
    whole = train(tiny_recipe(name, shards, tmp_path / "whole", *options, "checkpoint=1000"))
    run = tmp_path / "killed"
    path = run.with_suffix(".yaml")
    path.write_text(config.dump(tiny_recipe(name, shards, run, *options)))
    process = Forked(killer.run, [str(path)], output=(os.devnull, os.devnull))
    assert wait_for(lambda: len(rows(run)) > 14, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = trainer(path)
    assert done.returncode == 0, done.stderr
    assert (resumed := re.search(r"resumes from step (\d+)", done.stdout)) and int(resumed[1]) >= 6, done.stdout
    assert [(r["step"], r["loss"]) for r in rows(run)] == [(r["step"], r["loss"]) for r in rows(whole)]


@pytest.mark.slow
def test_sigterm_ends_at_a_step_with_a_checkpoint(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    path = recipe_file(shards, run)
    process = start(path)
    assert wait_for(lambda: len(rows(run)) > 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == EXIT_STOPPED
    last = rows(run)[-1]["step"]
    assert max(complete_checkpoints(run)).name == f"{last + 1:09d}"
    done = unlabeled("train", path)
    assert done.returncode == 0 and f"resumes from step {last + 1}" in done.stdout
    assert [r["step"] for r in rows(run)] == list(range(120))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_name(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "steps=4", "checkpoint=2")
    train(cfg)
    newest = max(complete_checkpoints(tmp_path / "run"))
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    done = trainer(tmp_path / "run")
    assert done.returncode == 2 and f"{data}: has 1000 bytes where" in done.stderr
    assert "checkpoint.resume=" in done.stderr


def test_half_a_checkpoint_is_not_seen(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "steps=4", "checkpoint=2")
    train(cfg)
    folder = tmp_path / "run" / "checkpoints" / "000000009"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"half")
    assert max(complete_checkpoints(tmp_path / "run")).name == "000000004"


@pytest.mark.slow
def test_keep(shards: Path, tmp_path: Path):
    run = train(tiny_recipe("mae", shards, tmp_path / "run", "steps=7", "checkpoint.every=2", "checkpoint.keep=3"))
    assert sorted(p.name for p in complete_checkpoints(run)) == ["000000004", "000000006", "000000007"]


@pytest.mark.slow
def test_killed_between_the_last_checkpoint_and_the_last_export(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "steps=4", "checkpoint=2")
    run = train(cfg)
    weights = (run / "export" / "4" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "export" / "4")
    train(tiny_recipe("mae", shards, tmp_path / "run", "steps=4", "checkpoint=2"))
    assert (run / "export" / "4" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_one_trainer_a_run_which_ends_with_its_launcher(shards: Path, tmp_path: Path):
    """A second start is refused, names host and process id, and changes nothing. kill -9 of the launcher ends the
    trainer, and the run can be resumed."""
    run = tmp_path / "run"
    path = recipe_file(shards, run)
    path.write_text(path.read_text().replace("steps: 120\n", "steps: 1000000\n"))  # it does not end by itself
    process = start(path)
    assert wait_for(lambda: len(rows(run)) > 3, process)
    first, stored = trainer_of(process), (run / "recipe.yaml").read_bytes()
    assert first is not None
    for second in (unlabeled("train", path, "log.every=7"), trainer(path, "overwrite=true")):
        assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
        assert f"{run}: is in use by process {process.pid} on {os.uname().nodename} since " in second.stderr
    assert (run / "recipe.yaml").read_bytes() == stored and process.poll() is None
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{first}").exists():
        assert time.monotonic() < deadline, "the trainer goes on without its launcher"
        time.sleep(0.05)
    assert max(complete_checkpoints(run)).name == f"{len(rows(run)):09d}"  # it has ended with a checkpoint
    (lock := Lock()).take(run)  # and the next start may have the folder
    lock.release()


@pytest.mark.slow
def test_a_missing_export_of_a_student_is_written_again(shards: Path, tmp_path: Path):
    options = ["steps=2", "checkpoint=1", "objective.students=[vit dim=24 depth=1 heads=2 image_size=32 patch_size=8]"]
    run = train(tiny_recipe("distillation", shards, tmp_path / "run", *options))
    (folder,) = (path for path in (run / "export").glob("*/2"))
    weights = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    train(tiny_recipe("distillation", shards, run, *options))
    assert (folder / "model.safetensors").read_bytes() == weights
