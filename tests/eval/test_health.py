"""Health of features without labels: each number on features for which it is known, and rows of a run's exports."""

from __future__ import annotations

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
from pretrain.models.layers import Features
from tests.eval.test_dense import patches


def test_rank():
    x = torch.linalg.qr(torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).double())[0]
    assert health.rankme(x) == pytest.approx(12, rel=1e-2)  # 12 equal singular values
    assert health.rankme(x[:, :1] @ torch.ones(1, 12).double()) == pytest.approx(1, abs=0.01)
    values = np.linalg.svd((x * torch.arange(1, 13)).numpy(), compute_uv=False)
    p = values / values.sum()
    assert health.rankme(x * torch.arange(1, 13)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-2)


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
    assert {row["metric"] for row in rows} >= {"rankme", "alpha", "std"} and rows[0]["count"] == 20
    with pytest.raises(DataError, match="no shards are named for health"):
        evaluate("pixels", ["health"], [], [])
    with pytest.raises(UserError, match="bytes: health measures models that read images, but this one reads texts"):
        health.run(open_encoder("bytes")[0], [], [str(shards)], Config())
