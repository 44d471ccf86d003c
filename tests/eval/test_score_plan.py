"""`unlabeled eval … --dry-run`: numbers of the plan against those of the evaluation, and that nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from common.errors import DataError
from eval import fewshot, knn, linear, logistic
from eval.score_plan import plan
from tests.conftest import call


def test_plan(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = [f"gallery={shards}", f"query={shards}", f"cache={tmp_path / 'cache'}"]
    words = ["eval", "pixels", "knn", "linear", "logistic", "fewshot", "attentive", "linear.steps=5"]
    call(*words, *data, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "cache").exists()
    assert re.match(r"pixels on cpu: 0 MB of weights, [\d,]+ images/s", lines[0])
    assert re.match(r"gallery: 48 images, 0.00 GB of features; 0:00 to extract", lines[1])
    assert [line.partition(":")[0] for line in lines[3:]] == [
        "knn",
        "linear",
        "logistic",
        "fewshot",
        "attentive",
        "classes",
    ]
    assert re.match(r"linear: \d+ MB, 0:0\d on cpu", lines[4]) and "does not depend on the size" in lines[7]
    call("eval", "pixels", "knn", *data)
    call("eval", "pixels", "knn", *data, "--dry-run")
    assert "gallery: 48 images, 0.00 GB of features; features are in the cache" in capsys.readouterr().out
    with pytest.raises(DataError, match="no shards are named"):
        plan("pixels", ["knn"], [], [])


def test_imagenet_fits_16_gb():
    """1,281,167 images and 1,000 classes, with the features of a ViT-L."""
    size = 1_281_167, 50_000, 1024, 1000
    wide = (*size[:2], 5 * 1024, 1000)  # class tokens of four blocks, and the mean of the patches
    assert knn.cost(knn.Config(), *size)[0] < 4e9
    assert linear.cost(linear.Config(), *wide)[0] < 4e9
    assert logistic.cost(logistic.Config(), *size)[0] < 1e9
    assert fewshot.cost(fewshot.Config(), *size)[0] < 4e9


def test_memory_of_heads_is_planned():
    """The numbers of the weights of all heads, as `train` makes them."""
    cfg = linear.Config(steps=1, batch=4, rates=[0.1, 1.0])
    heads = linear.train(torch.randn(9, 30), torch.arange(9) % 3, 3, cfg, torch.Generator().manual_seed(0))
    made = 4 * sum(value.numel() for head in heads for value in head)
    assert 2 * made <= linear.cost(cfg, 9, 9, 30, 3)[0] <= 2 * made + 4 * 1024 * (30 + 3 * 6) * 4
