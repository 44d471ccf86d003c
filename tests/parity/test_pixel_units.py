"""Pixels of other units than 0 to 255: what a run says of a wrong normalisation, and what TF32 would lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.build import stats
from data_pipeline.build.build_shards import build
from data_pipeline.views import colors, device_color
from pretrain.recipes import recipe
from pretrain.train import train
from tests.parity.test_pixel_dtypes import SMALL, params, scene


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the 11 bits of TF32."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_device_colours_keep_all_bits_where_products_are_in_tf32(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """A GPU rounds the inputs of matrix products, which has to leave the numbers of the pixels as they are."""
    einsum, baddbmm = torch.einsum, torch.baddbmm
    monkeypatch.setattr(torch, "einsum", lambda form, *all_of: einsum(form, *map(to_tf32, all_of)))
    monkeypatch.setattr(torch, "baddbmm", lambda x, a, b: baddbmm(x, to_tf32(a), to_tf32(b)))
    pixels = torch.from_numpy(scene(dtype, bands=3).transpose(2, 0, 1).copy())[None]
    constants = device_color.constants([0.0] * 3, [1.0] * 3, torch.device("cpu"), pixels.dtype)
    unchanged = torch.from_numpy(colors.color_row(params(), 3))[None]
    difference = device_color.apply(pixels, unchanged, constants).double() - pixels.double()
    assert difference.abs().max() <= (1 if dtype == "uint16" else 0.01)  # of 65,535; of numbers of about 1,000


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards of images of {a signed unit: int16, from -1,000 to 2,000; a share of white: uint16}."""
    out, rng = {}, np.random.default_rng(0)
    for dtype, low, high in (("int16", -1000, 2000), ("uint16", 30_000, 30_040)):
        folder = tmp_path_factory.mktemp(dtype)
        (folder / "images").mkdir()
        for number in range(12):
            np.save(folder / "images" / f"{number:02d}.npy", rng.integers(low, high, (24, 24, 3)).astype(dtype))
        build(folder / "images", folder / "shards")
        out[dtype] = folder / "shards"
    return out


@pytest.mark.parametrize(
    ("sets", "mean", "std", "wrong"),
    [
        (["int16"], 500, 866, []),
        (["int16"], 0.456, 0.225, ["int16"]),  # the default: of pixels from 0 to 1
        (["int16"], 500, 1e6, ["int16"]),
        (["uint16", "int16"], 500, 866, ["uint16"]),  # no mean fits both
        (["uint16"], 0.458, 0.0002, []),
        (["uint16"], 0.456, 0.225, []),  # of unsigned pixels, builds state the range
    ],
)
def test_a_wrong_normalisation_is_said(
    sets: list[str], mean: float, std: float, wrong: list[str], units: dict[str, Path], tmp_path: Path
):
    mix = ", ".join(f"{{shards: {units[name]}, weight: 1}}" for name in sets)
    numbers = [f"data.mean={[mean] * 3}", f"data.std={[std] * 3}"]
    train(recipe.load("mae_cpu", [*SMALL, f"data.mix=[{mix}]", *numbers, "steps=1", f"run={tmp_path / 'run'}"]))
    said = (tmp_path / "run" / "log.txt").read_text()
    assert said.count("which should be about 0 and 1") == len(wrong)
    for name in wrong:
        assert f"{units[name]}: with data.mean and data.std, its pixels have means up to" in said
        assert f"write those that `unlabeled shards stats {units[name]}` prints" in said


def test_statistics_have_digits_of_small_deviations(units: dict[str, Path]):
    """With four decimals, the deviation of numbers that use few of 65,536 levels would be 0."""
    (line,) = [each for each in stats.describe(stats.gather(units["uint16"])) if each.startswith("mean and deviation")]
    found = [float(number) for number in line.partition("data.std=[")[2].rstrip("]").split(",")]
    assert np.allclose(found, 40 / 12**0.5 / 65535, rtol=0.02)
