"""Whole runs on a GPU: resumed on another kind of device, scored and exported during the training, saved while the
training continues."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from pretrain.checkpoint.save import Saver
from pretrain.train import train
from tests.conftest import tiny_recipe


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("order", ["cpu first", "device first"])
def test_a_run_goes_on_on_another_kind_of_device(order: str, device: torch.device, shards: Path, tmp_path: Path):
    other = device.type if device.type == "cuda" else "auto"  # on a machine without a GPU, auto is the CPU
    first, second = ("cpu", other) if order == "cpu first" else (other, "cpu")
    common = ["optim.lr.kind=constant", "checkpoint=4"]
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", "steps=8", "device=cpu", *common))
    run = train(tiny_recipe("mae", shards, tmp_path / "run", "steps=4", f"device={first}", *common))
    train(tiny_recipe("mae", shards, run, "steps=8", f"device={second}", *common))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


@pytest.mark.slow
def test_exports_are_scored_beside_the_training(device: torch.device, shards: Path, tmp_path: Path):
    """The scoring process uses the GPU only if the recipe names it."""
    scores = [f"eval.gallery={shards}", f"eval.val={shards}", "export=2", "steps=4", f"device={device.type}"]
    run = train(tiny_recipe("mae", shards, tmp_path / "run", *scores))
    rows = map(json.loads, (run / "results.jsonl").read_text().splitlines())
    assert {row["step"] for row in rows} >= {0, 2, 4}


def test_an_async_save_stops_the_training_for_a_step_at_most(
    device: torch.device, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At sizes at which a step takes longer than a few small copies. The first save does not count, because it
    allocates memory."""
    seconds: list[float] = []
    save = Saver.save

    def timed(self: Saver, *args, **kwargs) -> None:
        began = time.perf_counter()
        save(self, *args, **kwargs)
        seconds.append(time.perf_counter() - began)

    monkeypatch.setattr(Saver, "save", timed)
    sizes = ["model.dim=768", "model.depth=12", "model.heads=12"] if device.type == "cuda" else []
    options = ["checkpoint.mode=async", "checkpoint=4", "steps=16", "log.every=1", f"device={device.type}", *sizes]
    run = train(tiny_recipe("mae", shards, tmp_path / "run", *options))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = median(16 / row["samples_per_second"] for row in rows)
    assert len(seconds) == 4  # 4, 8, 12, 16
    assert device.type == "cpu" or max(seconds[1:3]) < step
