"""The demo: its requirements are a subset of the pinned ones, and its training keeps a time limit."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from common.errors import UserError
from launch import demo
from pretrain.recipes.recipe import load
from pretrain.run_folder.prepare import prepare
from tests.conftest import tiny_recipe
from tests.forked import ROOT

PINS = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in (ROOT / "requirements.txt").open()}


def needed(names: list[str]) -> set[str]:
    """The installed packages on which these packages depend, directly or indirectly."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if key in found:
            continue
        found.add(key)
        try:
            below = map(Requirement, requires(wanted.name) or [])
        except PackageNotFoundError:
            continue
        extras = {"", *wanted.extras}
        waiting += [r for r in below if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return {key.partition("[")[0] for key in found}


def test_every_package_of_the_demo_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = needed([*project["dependencies"], *project["optional-dependencies"]["demo"], "setuptools"])
    assert wanted <= PINS, wanted - PINS
    assert len(wanted) < len(PINS) / 2  # the rest is for development


def test_make_demo_installs_less_than_make_test(tmp_path: Path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    plans = {
        goal: subprocess.run(["make", "-n", goal], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for goal in ("demo", "test")
    }
    assert "--constraint requirements.txt" in plans["demo"] and "-r requirements.txt" not in plans["demo"]
    assert "-r requirements.txt" in plans["test"] and "unlabeled demo" in plans["demo"]


@pytest.mark.slow
def test_fewer_steps_where_the_time_is_short(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny_recipe("mae", shards, tmp_path / "run", "steps=1000000")
    words = demo._in_time(recipe, 60)
    steps = load("demo", words).steps
    assert demo.MIN_STEPS <= steps < 1000000
    assert f"; to end after 1 minutes, the demo trains for {steps} steps" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    prepare(tiny_recipe("mae", shards, tmp_path / "run", "steps=33"))
    assert load("demo", demo._in_time(recipe, 60)).steps == 33  # the run that is there goes on
    monkeypatch.setattr(demo, "_steps_per_second", lambda recipe: 10.0)
    recipe = tiny_recipe("mae", shards, tmp_path / "other", "steps=100")
    assert demo._in_time(recipe, 60) == [] and "take about 0.2 minutes on this machine" in capsys.readouterr().out
    assert demo._in_time(recipe, 1) == ["steps=20", "export=20", "checkpoint=10", "eval.val=[]"]
    assert demo._in_time(recipe, 8)[1:] == ["export=15", "checkpoint=30"]


def test_a_budget_that_is_none():
    with pytest.raises(UserError, match="--minutes 0: write a number above 0"):
        demo.demo(minutes=0)
