"""Corruptions: all levels of all kinds, their strengths, and the mean corruption error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from eval import robustness
from eval.corruptions import CORRUPTIONS, SIZE, corrupt, plasma
from eval.features import Encoder, open_encoder
from eval.run import evaluate
from pretrain.models.layers import Features
from tests.eval.test_dense import _webp
from tests.tars import write_tar


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """An image [224, 224, 3] with smooth and with sharp parts, and with texture."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    image = np.stack([y, x, 0.5 + 0.4 * np.sin(20 * x) * np.cos(14 * y)], 2)
    image[60:140, 80:180] = (0.9, 0.2, 0.1)
    image += np.random.default_rng(0).uniform(-0.1, 0.1, (SIZE, SIZE, 1))
    return (image.clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_levels(name: str, photo: np.ndarray):
    """Each level gives an image; the change is deterministic, and grows from the first to the last level."""
    change = []
    for level in range(1, 6):
        out = corrupt(photo, name, level, np.random.default_rng(3))
        assert out.shape == photo.shape and out.dtype == np.uint8
        assert np.array_equal(out, corrupt(photo, name, level, np.random.default_rng(3)))
        change.append(float(np.square(out.astype(float) - photo).mean()))
    # The published strengths of elastic transform do not grow with the level: 1 and 2 move large parts of the image.
    assert min(change) > 1 and (change[4] > change[0] or name == "elastic_transform"), change


def test_strengths(photo: np.ndarray):
    """What the formulas say of the result, where that is simple."""
    gray, rng = np.full((SIZE, SIZE, 3), 128, np.uint8), np.random.default_rng(0)
    assert corrupt(gray, "gaussian_noise", 1, rng).std() / 255 == pytest.approx(0.08, rel=0.02)
    salt = corrupt(gray, "impulse_noise", 4, rng)
    assert (salt == 0).mean() == pytest.approx(0.085, rel=0.05) == pytest.approx((salt == 255).mean(), rel=0.1)
    assert corrupt(gray, "shot_noise", 5, rng).var() / 255**2 < 0.5 / 3  # variance x / 3, clipped at 1
    assert corrupt(gray, "brightness", 2, rng).mean() / 255 == pytest.approx(128 / 255 + 0.2, abs=0.01)
    assert corrupt(photo, "contrast", 5, rng).std(axis=(0, 1)) == pytest.approx(photo.std(axis=(0, 1)) * 0.05, rel=0.1)
    for name in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate"):  # keep what has no detail
        assert np.abs(corrupt(gray, name, 3, rng).astype(int) - 128).max() <= 1
    cloud = plasma(256, 2.0, rng)
    assert cloud.min() == 0 and cloud.max() == 1 and np.abs(np.diff(cloud)).mean() < 0.02


def test_mean_corruption_error():
    """AlexNet has 100 by definition."""
    assert robustness.mean_corruption_error({name: error for name, (_, error) in CORRUPTIONS.items()}) == pytest.approx(
        100
    )
    assert len(CORRUPTIONS) == 15


@pytest.mark.slow
def test_scores(shards: Path):
    sets, probe = ([str(shards)], [str(shards)]), {"steps": 50, "batch": 32}
    options = {"corruptions": ["gaussian_noise", "jpeg_compression"], "levels": [1, 5], "linear": probe}
    rows = evaluate("pixels", ["robustness"], *sets, options={"robustness": options})
    value = {row["metric"]: row["value"] for row in rows}
    accuracy = evaluate("pixels", ["linear"], *sets, options={"linear": probe})[0]
    assert value.keys() == {"corruption_error", "clean_error", "error_gaussian_noise", "error_jpeg_compression"}
    errors = (value["error_gaussian_noise"] + value["error_jpeg_compression"]) / 2
    assert value["corruption_error"] == pytest.approx(errors, abs=1e-6)
    assert (accuracy["metric"], 1 - accuracy["value"]) == ("accuracy", pytest.approx(value["clean_error"], abs=2e-6))


def test_queries_are_corrupted(tmp_path: Path):
    """Flat and noisy images, told apart by their roughness: with strong noise, all of them are classified as noisy. Five
    of the first nine are flat."""

    def roughness(images: torch.Tensor) -> Features:
        value = images.diff(dim=3).abs().mean((1, 2, 3))[:, None]
        return Features(value, value[:, None], value[:, None, :0], (1, 1))

    rng, members = np.random.default_rng(0), []
    for n in range(24):
        image = 128 + (n % 2) * rng.integers(-20, 20, (SIZE, SIZE, 3)) + n
        members += [(f"{n:02d}.webp", _webp(image.astype(np.uint8))), (f"{n:02d}.cls", str(n % 2).encode())]
    write_tar(tmp_path / "a.tar", members)
    encoder = Encoder(roughness, "roughness", SIZE, [0.5] * 3, [0.5] * 3)
    encoder.cache, shards = tmp_path / "cache", [str(tmp_path / "a.tar")]
    cfg = robustness.Config(corruptions=["gaussian_noise", "brightness"], levels=[5], samples=9)
    cfg.linear.steps, cfg.linear.batch = 100, 16
    expected = {"clean_error": 0, "error_gaussian_noise": 5 / 9, "error_brightness": 0, "corruption_error": 2.5 / 9}
    assert robustness.run(encoder, shards, shards, cfg) == pytest.approx(expected)


def test_errors(shards: Path):
    sets = [str(shards)], [str(shards)]
    with pytest.raises(UserError, match="corruptions: no 'fogg'; did you mean fog"):
        evaluate("pixels", ["robustness"], *sets, options={"robustness": {"corruptions": ["fogg"]}})
    with pytest.raises(UserError, match="robustness corrupts images with three channels"):
        robustness.run(open_encoder("bytes")[0], *map(list, sets), robustness.Config())
