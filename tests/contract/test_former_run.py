"""Files of a former version can still be read. `tests/data/former_run` is a run of DINOv2 with its shards, which a
version before the folders were rebuilt has written. Its checkpoint is of step 2 of 4; its metrics and its export are
of the whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.views import masks
from pretrain.interchange.export import load as load_export
from pretrain.recipes.recipe import load
from pretrain.train import train
from tests.conftest import unlabeled

FORMER = Path(__file__).parents[1] / "data" / "former_run"


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # its recipe names `shards` and `run` as they lie there
    shutil.copytree(FORMER, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_goes_on_from_its_checkpoint(former: Path, monkeypatch: pytest.MonkeyPatch):
    """Order of samples, views, optimizer state and teacher are restored: the steps after the checkpoint have the
    losses that the former version computed. Its last rectangles of a mask had an area of 4 or more."""
    monkeypatch.setattr(masks, "area_limits", lambda smallest, available: (smallest, max(smallest, available)))
    before, exported = rows(former), load_export(former / "export" / "4")[0].state_dict()
    shutil.rmtree(former / "export" / "4")
    run = train(load("run"))
    after = rows(run)
    assert [row["step"] for row in after] == [0, 1, 2, 3]
    for key in ("loss", "grad_norm", "koleo", "lr"):
        assert [row[key] for row in after] == pytest.approx([row[key] for row in before], rel=1e-4)
    again = load_export(run / "export" / "4")[0].state_dict()
    assert again.keys() == exported.keys()
    for key, value in exported.items():
        torch.testing.assert_close(again[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_its_checkpoint_starts_another_run(former: Path, tmp_path: Path):
    other = load("run", ["init.run=run", f"run={tmp_path / 'other'}", "checkpoint.resume=none", "steps=1"])
    assert rows(train(other))[0]["loss"] != rows(former)[0]["loss"]


@pytest.mark.slow
def test_its_export_is_scored_and_reported(former: Path):
    done = unlabeled("eval", "run/export/4", "knn", "gallery=shards", "query=shards", cwd=former.parent)
    assert done.returncode == 0 and "knn" in done.stdout, done.stderr
    done = unlabeled("report", "run", cwd=former.parent)
    assert done.returncode == 0 and (former / "report.html").is_file(), done.stderr
