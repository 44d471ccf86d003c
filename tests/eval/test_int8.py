"""Encoders with int8 weights: the file against the simulation of its arithmetic, a layer that is known to lose most, and
the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from common.errors import UserError
from launch.model_commands import quantize
from pretrain.interchange import int8, weights
from pretrain.interchange.export_formats import PlainOutputs
from tests.eval.test_report import make_run
from tests.parity.test_models import resnet, vit


def test_a_layer_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    layer, x = torch.nn.Linear(5, 3), torch.randn(4, 5, generator=generator)
    step = (max(float(x.max()), 0) - min(float(x.min()), 0)) / 255
    zero = round(-min(float(x.min()), 0) / step)
    expected = np.zeros((4, 3))
    for row in range(4):
        for out in range(3):
            scale, total = float(layer.weight[out].abs().max()) / 127, 0
            for k in range(5):
                total += round(float(layer.weight[out, k]) / scale) * (round(float(x[row, k]) / step + zero) - zero)
            expected[row, out] = total * scale * step + float(layer.bias[out])
    with torch.no_grad():
        np.testing.assert_allclose(int8.int8_linear(layer, x).numpy(), expected, atol=2 * step * 0.5)
        assert np.abs(int8.int8_linear(layer, x).numpy() - expected).mean() < 0.1 * step


def test_the_layer_with_an_outlier_loses_most():
    """One input of a layer is far larger than the others, so that these share few of the 256 steps."""
    encoder = vit(dim=64, heads=2).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = [*int8.linear_layers(encoder)]
    assert {each.layer for each in int8.layer_losses(encoder, images)} == {*names}
    with torch.no_grad():  # its product is 0, so that the features do not change
        encoder.blocks[1].norm2.bias[5] = 1000.0
        encoder.blocks[1].mlp.fc1.weight[:, 5] = 0.0
    first, second, *others = int8.layer_losses(encoder, images)
    errors = [each.features for each in (first, second, *others)]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(names)
    assert first.layer == "blocks.1.mlp.fc1" and first.features > 3 * second.features
    assert first.own > 0.1 and first.outliers > 5
    assert not any(module._forward_hooks for module in encoder.modules())


def test_a_model_without_linear_layers(tmp_path: Path):
    with pytest.raises(UserError, match="has no linear layers"):
        int8.quantize(tmp_path, resnet())


def largest_weight(path: Path) -> int:
    """The largest absolute value of the int8 tensors of a file."""
    tensors = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    return max(int(np.abs(each.astype(int)).max()) for each in tensors if each.dtype == np.int8)


@pytest.mark.slow
def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = make_run(tmp_path / "run", shards, "model.dim=64") / "export" / "40"
    words = ["knn", f"cache={tmp_path / 'cache'}"]
    quantize(str(folder), words, samples=8)
    out, found = capsys.readouterr().out, json.loads((folder / "int8.json").read_text())
    assert f"{folder}/model.int8.onnx" in out and "largest input / rms" in out and "k-NN" in out
    assert not (folder / int8.PARTIAL).exists() and found["bytes"]["int8"] < found["bytes"]["fp32"]
    assert found["bytes"]["int8"] == (folder / "model.int8.onnx").stat().st_size
    assert len([*(tmp_path / "cache").rglob("*.npy")]) == 2  # the features of both models are kept, and used, apart
    encoder, _ = weights.load_backbone(folder)
    assert {one["layer"] for one in found["layers"]} == {*int8.linear_layers(encoder)}
    assert 0 < found["features"] < 0.1 and found["latency_ms"].keys() == {"fp32", "int8"}
    for metrics in found["scores"].values():
        assert abs(metrics["accuracy"]["int8"] - metrics["accuracy"]["fp32"]) < 0.2
    backbone = int8.OnnxBackbone(folder / "model.int8.onnx", encoder.patch_size)
    for size in ((1, 32, 32), (3, 16, 48)):
        images = torch.randn(size[0], 3, *size[1:])
        with torch.inference_mode():
            full, simulated, real = PlainOutputs(encoder)(images), int8.simulate(encoder, images), backbone(images)
        for exact, same, given in zip(full, simulated, (real.cls, real.tokens), strict=True):
            error, difference = float((given - exact).norm()), float((given - same).norm())
            assert error > 0 and difference < 0.5 * error  # roundings of ties apart, the arithmetic is the same
    with pytest.raises(UserError, match="several models are scored here"):
        quantize(str(folder), ["logistic", "logistic.save=probe", *words[1:]])
    assert largest_weight(folder / int8.MODEL) == 127
    assert largest_weight(int8.quantize(folder, encoder, reduce_range=True)) == 64
    with pytest.raises(UserError, match="no data are named"):
        quantize(str(folder), ["query=[]"])
    with pytest.raises(UserError, match="pixels: int8 files are written of exports"):
        quantize("pixels", [f"gallery={shards}", f"query={shards}"])
