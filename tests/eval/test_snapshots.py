"""Statistics of patch similarities, for known maps and for the exports of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from eval.features import Encoder
from eval.gram_teachers import compare, load, statistics, table
from launch import command_parser
from launch.cli import parser
from pretrain.models.layers import Features
from pretrain.train import train
from tests.conftest import tiny_recipe


def encoder(noise: float) -> Encoder:
    """An encoder whose patch features are the centred mean colours of cells of 8 pixels, plus noise that does not
    depend on the image."""

    def backbone(x: Tensor) -> Features:
        maps = torch.nn.functional.avg_pool2d(x, 8)
        tokens = maps.flatten(2).transpose(1, 2) - maps.mean((2, 3)).unsqueeze(1)
        tokens = tokens + noise * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(tokens.shape[1]))
        return Features(tokens[:, 0], tokens, tokens[:, :0], tuple(maps.shape[2:]))

    return Encoder(backbone, "pretrained", 64, [0.5] * 3, [0.25] * 3)


def smooth() -> np.ndarray:
    """An image of smooth colours, uint8 [3, 128, 128]."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 4, 4)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, (128, 128), mode="bilinear")[0].byte().numpy()


def test_clean_maps_score_above_noisy_ones():
    clean, noisy, nothing = (statistics(encoder(noise), smooth()) for noise in (0.0, 1.0, 30.0))
    assert clean["agreement"] > 0.99 and clean["coherence"] > 0.8
    for key in ("agreement", "coherence"):
        assert clean[key] > noisy[key] > nothing[key] - 0.05, key
    assert clean["agreement"] * clean["contrast"] > 5 * nothing["agreement"] * nothing["contrast"]
    assert abs(nothing["agreement"]) < 0.1 and abs(nothing["coherence"]) < 0.2


def test_coherence_equals_a_loop():
    own, image = encoder(0.5), smooth()
    small = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None].float(), scale_factor=0.5, mode="bicubic", antialias=True
    )
    x = torch.nn.functional.normalize(own(small.round().clamp(0, 255).byte().numpy()).tokens[0], dim=-1)
    pairs = [float(x[i] @ x[j]) for i in range(64) for j in range(64) if i != j]
    beside = [float(x[i] @ x[i + 1]) for i in range(64) if i % 8 < 7] + [float(x[i] @ x[i + 8]) for i in range(56)]
    expected = (np.mean(beside) - np.mean(pairs)) / np.std(pairs, ddof=1)
    assert statistics(own, image)["coherence"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_exports_of_a_run_are_compared(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = train(tiny_recipe("dinov2", shards, tmp_path / "run", "steps=2", "export=1"))
    rows = compare(run, [str(shards)], 8)
    assert [r["step"] for r in rows] == [1, 2] and all(r["score"] == r["agreement"] * r["contrast"] for r in rows)
    best = 1 + int(rows[1]["score"] > rows[0]["score"])
    assert f"gram_teacher={run / 'export' / str(best)}" in table(rows, run)
    for first, second, step in [(0.9, 0.1, 1), (0.1, 0.9, 2)]:
        rows[0]["score"], rows[1]["score"] = first, second
        assert table(rows, run).endswith(f"gram_teacher={run / 'export' / str(step)}")
    args = parser().parse_args(["snapshots", str(run), "--images", "8"])
    command_parser.call(args)
    assert f"step {best} has the clearest similarities" in capsys.readouterr().out
    assert load([str(shards)], encoder(0.0), 1000).shape == (48, 3, 128, 128)
    (tmp_path / "none" / "export").mkdir(parents=True)
    with pytest.raises(UserError, match="has no export of a trained step"):
        compare(tmp_path / "none", [str(shards)])
    text = train(tiny_recipe("gpt", shards, tmp_path / "text", "steps=1"))
    with pytest.raises(UserError, match="trains a model for text, which has no patches"):
        compare(text, [str(shards)])
