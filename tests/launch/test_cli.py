"""The command line: fast help and errors, one line for mistakes of the user, and a whole run from a folder of images
to a report."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import config
from common.errors import UserError
from launch.commands import COMMANDS
from launch.export_checkpoint import export
from pretrain.recipes.recipe import load
from tests.conftest import sampled, tiny_recipe, trainer, unlabeled


def test_messages_and_docstrings_name_commands_that_exist():
    root = Path(__file__).parents[2]
    files = [
        path
        for folder in ("common", "data_pipeline", "pretrain", "eval", "launch")
        for path in root.glob(f"{folder}/**/*.py")
    ]
    named = {(path.name, word) for path in files for word in re.findall(r"`unlabeled ([a-z][a-z-]*)", path.read_text())}
    assert len(named) > 50
    assert not {(file, word) for file, word in named if word not in COMMANDS}


def startup_ratio(*args: str) -> float:
    """The CPU seconds of a command, divided by those that Python needs to import the modules of every command; each
    is the best of five alternating measurements. A ratio is used because machines differ by a factor of three and
    may be busy; on a fast one, 1 is 0.05 seconds. Importing torch is 30 to 40."""
    silent = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    commands = (["-m", "launch.cli", *args], ["-c", "import argparse, dataclasses, yaml"])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for found, command in zip(seconds, commands, strict=True):
            child = os.posix_spawn(sys.executable, [sys.executable, *command], os.environ, file_actions=silent)
            _, _, used = os.wait4(child, 0)
            found.append(used.ru_utime + used.ru_stime)
    return min(seconds[0]) / min(seconds[1])


FAST = [
    ("--help",),
    ("train", "--help"),
    ("recipes",),
    ("train", "demo", "objective.foo=1"),
    ("train", "nope"),
    ("eval", "pixels", "kn"),
]


@pytest.mark.parametrize("args", sampled(FAST, FAST[0], FAST[3], others=pytest.mark.slow), ids=" ".join)
def test_help_and_errors_come_at_once(args: tuple[str, ...]):
    assert startup_ratio(*args) < 3.5


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("train", "demos"), "error: demos: no such recipe; did you mean demo"),
        (("train", "demo", "model=vit_huge"), "no such model"),
        (("train", "demo", "objective.mask_ratio=1"), "error: command line: objective.mask_ratio = 1: no such key"),
        (("shards", "build", "/nowhere", "/tmp/x"), "error: /nowhere: no such file or folder"),
        (
            ("shards", "build", ".", "/tmp/x", "--kind", "film"),
            "error: --kind film: no such kind of source; known: arrays, audio, frame-folders",
        ),
        (
            ("shards", "verify", "/nowhere"),
            "error: /nowhere: has no manifest.json; make it with `unlabeled shards index",
        ),
        (("shards", "index", "/nowhere"), "error: /nowhere: holds no .tar shards"),
        (("shards", "stats", "/nowhere"), "error: /nowhere: no such file or folder"),
        (("shards", "split", "/nowhere", "/tmp/x", "--val", "2"), "error: --val 2.0 --test 0.0: write shares"),
        (("export", "/nowhere"), "error: /nowhere: no such run folder or file"),
        (
            ("train", "demo", "--steps", "5"),
            "error: --steps: keys of a recipe are written without dashes; write steps=5",
        ),
        (("train", "demo", "--optim.lr.value=1e-3"), "without dashes; write optim.lr.value=1e-3"),
        (("report", "/nowhere"), "error: /nowhere"),
    ],
)
def test_one_line_errors(args: tuple[str, ...], says: str):
    done = unlabeled(*args)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_trainer_errors_are_one_line_too(shards: Path, tmp_path: Path):
    """The command finds the first error; the trainer that it starts finds the others."""
    run = tmp_path / "run"  # one folder for all: a run that failed before its first step does not stand in the way
    cases = [
        (["data.train=/nowhere"], "/nowhere: no such file or folder"),
        (["data.batch=1000"], "data.batch = 1000 is more than the 48 samples"),
        (["model.heads=3"], "model.dim = 32 must be a multiple of model.heads = 3"),
        (["device=cuda:9"], "device = 'cuda:9': cannot be used here"),
        (["objective=dinov2", "model=resnet_micro"], "model.mask_token"),
    ]
    for n, (overrides, says) in enumerate(cases):
        path = tmp_path / "r.yaml"
        path.write_text(config.dump(tiny_recipe("mae", shards, run)))
        done = trainer(path, *overrides) if n else unlabeled("train", path, *overrides)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_shards_commands(photos: Path, tmp_path: Path):
    """build, index, verify, stats and split, one after the other."""
    whole = tmp_path / "whole"
    built = unlabeled("shards", "build", photos, whole, "--shard-mb", "0.1", "--workers", "1")
    assert built.returncode == 0 and f"{whole}: 48 samples" in built.stdout and "2 classes" in built.stdout, (
        built.stderr
    )
    (whole / "manifest.json").unlink()
    indexed = unlabeled("shards", "index", whole)
    assert indexed.returncode == 0 and "48 samples" in indexed.stdout, indexed.stderr
    verified = unlabeled("shards", "verify", whole)
    assert verified.returncode == 0 and "every byte is as it was indexed" in verified.stdout, verified.stderr
    seen = unlabeled("shards", "stats", whole, "--sheet", tmp_path / "sheet.png")
    assert seen.returncode == 0 and "48 images decoded, evenly spread over the set: 0 damaged" in seen.stdout, (
        seen.stderr
    )
    assert (tmp_path / "sheet.png").stat().st_size > 50_000
    parts = unlabeled("shards", "split", whole, tmp_path / "parts", "--val", "0.3", "--test", "0.2", "--workers", "1")
    assert parts.returncode == 0 and f"{tmp_path}/parts/test: " in parts.stdout, parts.stderr
    assert unlabeled("shards", "verify", tmp_path / "parts" / "val").returncode == 0
    tar = whole / "000001.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[1000] ^= 1
    tar.write_bytes(damaged)
    verified = unlabeled("shards", "verify", whole)
    assert verified.returncode == 1 and "000001.tar" in verified.stdout


def test_recipes_lists_purposes():
    done = unlabeled("recipes")
    assert "demo" in done.stdout and "arXiv 2111.06377" in done.stdout


def test_doctor():
    done = unlabeled("doctor")
    assert done.returncode == 0 and "torch" in done.stdout and "cpu" in done.stdout


@pytest.mark.slow
def test_run_folder_rules(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    path = tmp_path / "r.yaml"
    path.write_text(config.dump(tiny_recipe("mae", shards, run, "steps=3")))
    assert unlabeled("train", path).returncode == 0
    again = unlabeled("train", path)
    assert again.returncode == 0 and "has finished its 3 steps; overwrite=true starts it again" in again.stdout
    assert trainer(run).returncode == 0  # the run folder stands for its recipe
    assert trainer(path, "log.every=2").returncode == 0  # changes no number
    other = unlabeled("train", path, "optim.lr=0.5")
    assert (
        other.returncode == 2
        and "holds a run of another recipe (optim.lr.value: 0.001 → 0.5)" in other.stderr
        and "overwrite=true" in other.stderr
    )
    assert trainer(path, "optim.lr=0.5", "overwrite=true").returncode == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for extra in ([], ["overwrite=true"]):
        foreign = unlabeled("train", path, f"run={tmp_path / 'full'}", *extra)
        assert foreign.returncode == 2 and "holds files but no run" in foreign.stderr
    assert (tmp_path / "full" / "mine.txt").is_file()


@pytest.mark.slow
def test_a_folder_of_images_to_a_report(photos: Path, tmp_path: Path):
    """As in the README: build, train with scores, eval, export, report. Checks every file of the run folder."""
    built = unlabeled("shards", "build", photos, tmp_path / "shards")
    assert built.returncode == 0 and "48 samples" in built.stdout, built.stderr
    run, path = tmp_path / "run", tmp_path / "r.yaml"
    data = [f"eval.{key}={tmp_path / 'shards'}" for key in ("gallery", "val", "test")]
    path.write_text(
        config.dump(tiny_recipe("mae", tmp_path / "shards", run, "steps=20", "export=10", "eval.image_size=16", *data))
    )
    began = time.monotonic()
    done = unlabeled("train", path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    scored = {(r["model"], r["step"], r["split"], r["protocol"]) for r in rows if r["metric"] == "accuracy"}
    assert scored == {
        *{("pixels", 0, "test", p) for p in ("knn", "linear")},
        *{(m, s, "test", p) for m, s in (("untrained", 0), ("pretrained", 20)) for p in ("knn", "linear")},
        *{(m, s, "val", "knn") for m, s in (("untrained", 0), ("pretrained", 10), ("pretrained", 20))},
    }
    assert all(0 <= r["seconds"] < time.monotonic() - began for r in rows)
    (closing,) = [line for line in done.stdout.splitlines() if "finished its 20 steps" in line]
    assert f"its export is {run}/export/20, its scores will be in {run}/results.jsonl. Next: " in closing
    report, score = (shlex.split(command) for command in re.findall("`([^`]+)`", closing))
    assert unlabeled(*report[1:]).stdout == f"{run}/report.html\n" and f"writes {run}/report.html; " in closing
    assert score == ["unlabeled", "eval", f"{run}/export/20"]  # below
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "export",
        "results.jsonl",
        "log.txt",
        "report.html",
        "pictures",
    ):
        assert (run / name).exists(), name
    board = subprocess.run(
        ["grep", "-rlc", "val/knn/accuracy", str(run / "tensorboard")], capture_output=True, text=True
    )
    assert board.stdout.strip()
    scores = unlabeled("eval", run / "export" / "20", "knn")
    assert scores.returncode == 0 and "pretrained  knn       accuracy" in scores.stdout, scores.stderr
    exported = unlabeled("export", run, tmp_path / "mine")
    assert exported.returncode == 0 and "AutoModel" in exported.stdout, exported.stderr
    same = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "mine", run / "export" / "20")]
    assert same[0] == same[1]
    missing = unlabeled("export", run, "--step", "7")
    assert missing.returncode == 2 and "no checkpoint of step 7; it has: 20" in missing.stderr


@pytest.mark.slow
def test_demo_from_digits(tmp_path: Path):
    """The whole `unlabeled demo`, with the images that need no download."""
    done = unlabeled(
        "demo",
        "--source",
        "digits",
        "steps=20",
        "data.batch=64",
        "export=10",
        "threads=1",
        "model.depth=1",
        "eval.image_size=16",
        "eval.final.options=[linear.steps=60]",  # the linear probe of the pixels takes most of the time
        cwd=tmp_path,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    for word in ("pixels", "untrained", "pretrained", "knn", "linear", "report: runs/demo/report.html"):
        assert word in done.stdout
    assert (tmp_path / "runs/demo/report.html").stat().st_size > 50_000


def test_an_export_of_a_run_without_checkpoints(tmp_path: Path):
    recipe = load("demo", ["data.train=shards", f"run={tmp_path}"])
    with pytest.raises(
        UserError, match=f"{tmp_path}: has no checkpoint yet; train it first: unlabeled train {tmp_path}"
    ):
        export(tmp_path, recipe, None, None, [])
