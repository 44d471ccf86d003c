"""Health of features without labels: each number on features for which it is known, and rows of a run's exports."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import DataError, UserError
from eval import health
from eval.features import Encoder, open_encoder
from eval.health import Config
from eval.run import evaluate
from launch import watch
from pretrain import collapse_monitor
from pretrain.interchange import export
from pretrain.metrics import Board
from pretrain.models.build import build_model
from pretrain.models.layers import Features
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.recipe_file import write_recipe
from tests.conftest import tiny_recipe
from tests.eval.test_dense import patches


def test_rank():
    x = torch.linalg.qr(torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).double())[0]
    assert health.rankme(x) == pytest.approx(12, rel=1e-2)  # 12 equal singular values
    assert health.rankme(x[:, :1] @ torch.ones(1, 12).double()) == pytest.approx(1, abs=0.01)
    values = np.linalg.svd((x * torch.arange(1, 13)).numpy(), compute_uv=False)
    p = values / values.sum()
    assert health.rankme(x * torch.arange(1, 13)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-2)


def _naive_rank(values: np.ndarray, epsilon: float) -> float:
    p = values / values.sum() + epsilon
    return float(np.exp(-sum(each * np.log(each) for each in p)))


def _naive(x: np.ndarray) -> dict[str, float]:
    """The numbers of features [N, V, D] by the formulas of the papers, with loops and with roots of matrices."""
    count, crops, width = x.shape
    first = x[:, 0]
    unit = x / np.sqrt((x**2).sum(2, keepdims=True))
    singular = np.sqrt(np.linalg.eigvalsh(first.T @ first).clip(0))
    eigenvalues = np.linalg.eigvalsh(np.cov(first.T, bias=True))[::-1]
    fitted = np.arange(3, max(5, width // 2) + 1)
    means = x.mean(1)
    between, within = np.zeros((width, width)), 1e-4 * np.eye(width)
    for i in range(count):
        between += np.outer(means[i] - means.mean(0), means[i] - means.mean(0)) / count
        for j in range(crops):
            within += np.outer(x[i, j] - means[i], x[i, j] - means[i]) / (count * crops)
    scales, basis = np.linalg.eigh(within)
    root = basis @ np.diag(scales**-0.5) @ basis.T  # Σ_w^−½
    pairs = [((unit[i, 0] - unit[j, 0]) ** 2).sum() for i in range(count) for j in range(count) if i != j]
    return {
        "rankme": _naive_rank(singular, 1e-5),
        "alpha": -np.polyfit(np.log(fitted), np.log(eigenvalues[fitted - 1]), 1)[0],
        "lidar": _naive_rank(np.linalg.eigvalsh(root @ between @ root), 1e-7),
        "alignment": np.mean([((unit[i, 0] - unit[i, 1]) ** 2).sum() for i in range(count)]),
        "uniformity": np.log(np.mean(np.exp(-2 * np.array(pairs)))),
    }


def test_numbers_are_those_of_the_papers():
    """In float64, for features whose directions differ in variance between images and between crops."""
    rng = np.random.default_rng(0)
    between, within = rng.uniform(0.1, 3, 12), rng.uniform(0.1, 1, 12)
    x = rng.standard_normal((40, 1, 12)) * between + rng.standard_normal((40, 5, 12)) * within + 0.3
    views = torch.from_numpy(x)
    found = {name: getattr(health, name)(views[:, 0]) for name in ("rankme", "alpha", "uniformity")}
    found |= {"lidar": health.lidar(views), "alignment": health.alignment(views[:, 0], views[:, 1])}
    assert found == pytest.approx(_naive(x), rel=1e-9)


def test_lidar_counts_the_directions_that_tell_images_apart():
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(300, 1, 10, generator=generator).double() * torch.tensor([1.0] * 4 + [0] * 6)
    views = apart + 0.1 * torch.randn(300, 8, 10, generator=generator).double()
    assert health.lidar(views) == pytest.approx(4, abs=0.2) and health.rankme(views.flatten(0, 1)) > 4.5
    assert health.lidar(torch.ones(20, 3, 5).double()) == pytest.approx(1, abs=1e-4)  # collapsed


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_the_eigenvalues(exponent: float):
    noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(noise - noise.mean(0))[0]
    x = basis * torch.arange(1, 41).double() ** (-exponent / 2) + 3
    assert health.alpha(x) == pytest.approx(exponent, rel=1e-6)


def test_uniformity_and_patch_similarity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "PAIR_CHUNK", 7)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()
    unit = F.normalize(x, dim=1)
    pairs = [float((unit[i] - unit[j]).square().sum()) for i in range(20) for j in range(20) if i != j]
    assert health.uniformity(x) == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(pairs)))))
    assert health.uniformity(torch.ones(20, 5).double()) == pytest.approx(0)
    tokens = F.normalize(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    expected = [np.mean([float(t[i] @ t[j]) for i in range(6) for j in range(6) if i != j]) for t in tokens]
    assert health.patch_similarity(2 * tokens).tolist() == pytest.approx(expected, abs=1e-5)


def test_collapse_shows(shards: Path, tmp_path: Path):
    def collapsed(images: torch.Tensor) -> Features:
        tokens = 1e-3 * images.mean((2, 3))[:, None].expand(-1, 4, -1) + torch.ones(1, 4, 3)
        return Features(tokens.mean(1), tokens, tokens[:, :0], (2, 2))

    good = health.run(patches(tmp_path), [], [str(shards)], Config())
    bad = health.run(Encoder(collapsed, "collapsed", 32, [0.5] * 3, [0.5] * 3), [], [str(shards)], Config())
    assert "alpha" not in good  # of three features
    assert bad["std"] < 0.01 < good["std"] and bad["rankme"] < 1.1 < good["rankme"]
    assert bad["uniformity"] > -1e-3 > good["uniformity"] and bad["patch_similarity"] > 0.999 > good["patch_similarity"]
    assert (
        0 < good["alignment"] < 2
        and good["count"] == 48
        and health.run(patches(tmp_path), [str(shards)], [], Config()) == good
    )  # the same images and crops each time


def test_rows_and_errors(shards: Path):
    rows = evaluate("pixels", ["health"], [], [str(shards)], options={"health": {"samples": 20}})
    assert {row["metric"] for row in rows} >= {"rankme", "lidar", "alpha", "std"} and rows[0]["count"] == 20
    with pytest.raises(DataError, match="no shards are named for health"):
        evaluate("pixels", ["health"], [], [])
    with pytest.raises(UserError, match="bytes: health measures models that read images, but this one reads texts"):
        health.run(open_encoder("bytes")[0], [], [str(shards)], Config())


def test_a_collapse_is_noted_with_what_to_change(shards: Path, tmp_path: Path):
    """In the rows of the export, and in log.txt: the options that the objective has."""
    run = tmp_path / "run"
    recipe = tiny_recipe("ijepa", shards, run, "steps=40", "eval.health=16")
    run.mkdir()
    write_recipe(recipe, run)
    (run / "metrics.jsonl").write_text('{"step": 39, "loss": 1.0}\n')
    for step in (0, 20, 40):
        torch.manual_seed(0)
        encoder = build_model(recipe.model)
        if step == 40:
            torch.nn.init.zeros_(encoder.norm.weight)
            torch.nn.init.ones_(encoder.norm.bias)
        export.write(
            run / "export" / str(step),
            encoder,
            {"step": step, "objective": "ijepa", "pool": "mean"},
            [0.5] * 3,
            [0.5] * 3,
        )
        board = Board(run / "tensorboard")
        assert watch.score(run, recipe, str(run / "export" / str(step)), step, "train", board, "cpu") == []
    notes = {(row["step"], row.get("note", "")) for row in read_rows(run / "results.jsonl")}
    (reason,) = {note for step, note in notes if note}
    assert notes == {(0, ""), (20, ""), (40, reason)}
    assert re.fullmatch(
        r"the features of all images are becoming alike \(std 0\S*, untrained \S+, rankme 1, untrained \S+\); lower"
        r" optim\.lr, raise objective\.momentum, or train with a larger batch",
        reason,
    )
    assert (run / "log.txt").read_text().count("step 40: collapse: the features of all images are becoming alike") == 1
    assert f"Note: {reason}." in (run / "export" / "40" / "README.md").read_text()


def test_what_looks_collapsed():
    healthy, advice = {"std": 0.5, "rankme": 9.0}, {"feature_std": "raise objective.a", "rank": "raise objective.b"}
    assert collapse_monitor.of_health(healthy, healthy, advice) == ""
    assert collapse_monitor.of_health({"std": 0.06, "rankme": 1.6}, healthy, advice) == ""
    assert "raise objective.a" in collapse_monitor.of_health({"std": 0.04, "rankme": 5.0}, healthy, advice)
    alike = collapse_monitor.of_health({"std": 0.5, "rankme": 1.2}, healthy, advice)
    assert "rankme 1.2, untrained 9)" in alike and "raise objective.b" in alike and "std" not in alike
    assert collapse_monitor.of_health({"std": 0.5, "rankme": 1.2}, {"std": 0.5, "rankme": 1.3}, advice) == ""
