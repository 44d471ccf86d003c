"""Further formats of an export are opened by the libraries that they are for, and compared; a model card agrees with
the files of the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from common.errors import UserError
from launch import command_parser
from launch.cli import parser
from pretrain.interchange import export, export_formats, model_card, weights
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.parity.test_models import ABOUT, MEAN, STD, resnet, vit
from tests.parity.test_weights import DINOV3, convnext

MODELS = {
    "dinov3": lambda: vit(**DINOV3),
    "registers": lambda: vit(registers=2, layer_scale=0.5, mask_token=True),
    "convnext": lambda: convnext(image_size=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_forms(tmp_path: Path, name: str):
    wide = {"dim": 128, "heads": 2} if name != "convnext" else {}  # the official layout's heads are 64 wide
    model = (
        MODELS[name]()
        if not wide
        else vit(**(DINOV3 if name == "dinov3" else {"registers": 2, "layer_scale": 0.5}), **wide)
    )
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    lines = export_formats.release(tmp_path / "out", ["transformers", "timm", "official", "torch"])
    assert len(lines) == 4 and all("opened again" in line for line in lines)
    usual = {"dinov3": 1e-5, "registers": 1e-6}
    assert ("does not store the norms' eps" in lines[2]) == (name in usual and model.cfg.norm_eps != usual[name])
    again, about = weights.load_backbone(tmp_path / "out" / "timm")
    assert about["mean"] == MEAN
    size = model.image_size
    with torch.no_grad():
        x = torch.randn(3, 3, size, size)
        cls, tokens = torch.export.load(tmp_path / "out" / "model.pt2").module()(x)
        torch.testing.assert_close(cls, model(x).cls, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens, again(x).tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "convnext"])
def test_onnx(tmp_path: Path, name: str):
    export.write(tmp_path / "out", MODELS[name](), ABOUT, MEAN, STD)
    (line,) = export_formats.release(tmp_path / "out", ["onnx"])
    assert "model.onnx: opened again" in line
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    encoder, _ = weights.load_backbone(tmp_path / "out")
    size = encoder.example().shape[-1]
    for batch, height, width in ((1, size, size), (3, size, 2 * size), (2, 3 * size, size)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            ours = export_formats.PlainOutputs(encoder)(images)
        for mine, theirs in zip(ours, session.run(None, {"images": images.numpy()}), strict=True):
            assert theirs.shape == mine.shape and np.abs(mine.numpy() - theirs).max() < 1e-4


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export.write(tmp_path / "out", resnet(stem="small"), ABOUT, MEAN, STD)
    for form, message in [
        ("tim", "'tim': no such export format; did you mean"),
        ("timm", "cannot be written for timm"),
        ("official", "ViTs and ConvNeXts only"),
        ("transformers", "no ResNet with a small stem"),
    ]:
        with pytest.raises(UserError, match=message):
            export_formats.release(tmp_path / "out", [form])
    export.write(tmp_path / "out", vit(**DINOV3), ABOUT, MEAN, STD)

    def wrong(folder: Path, encoder: nn.Module, *_: object) -> tuple:
        return "there", (torch.zeros(2, 32), None)

    monkeypatch.setitem(export_formats.FORMATS, "torch", wrong)
    with pytest.raises(UserError, match="there: torch gives other features from it"):
        export_formats.release(tmp_path / "out", ["torch"])
    monkeypatch.setitem(export_formats.FORMATS, "torch", lambda *_: ("there", None))
    assert "were not compared" in export_formats.release(tmp_path / "out", ["torch"])[0]


@pytest.mark.slow
def test_weights_that_are_too_large_for_a_file_of_onnx(tmp_path: Path):
    with torch.device("meta"):
        encoder = vit(dim=4096, depth=4, heads=32)
    with pytest.raises(UserError, match=r"the weights have 3\.\d GB, but a file of this format holds at most 2 GB"):
        export_formats.write_onnx(encoder, torch.zeros(2, 3, 32, 32), tmp_path / "model.onnx")


def test_a_form_that_fails_leaves_nothing_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export.write(tmp_path / "out", vit(**{**DINOV3, "key_bias": True}), ABOUT, MEAN, STD)
    said: list[str] = []
    broken = export_formats.FORMATS["official"]

    def differs(*args) -> tuple:
        where, (cls, tokens) = broken(*args)
        return where, (cls + 1, tokens)

    monkeypatch.setitem(export_formats.FORMATS, "official", differs)
    with pytest.raises(UserError, match=r"no bias for keys.*; .*official.pth: official gives other features"):
        export_formats.release(tmp_path / "out", ["timm", "official", "torch"], said.append)
    assert len(said) == 1 and "model.pt2: opened again" in said[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.pt2" in names and not names & {"timm", "official.pth"}
    monkeypatch.setitem(export_formats.FORMATS, "official", broken)
    assert len(export_formats.release(tmp_path / "out", ["official", "torch"])) == 2


@pytest.mark.slow
def test_an_error_of_another_library_is_one_line_and_the_other_forms_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Such an error has many lines and occurs while files are written. Earlier files of this format are kept, and so
    are files of the user."""
    out = tmp_path / "out"
    export.write(out, vit(**DINOV3), ABOUT, MEAN, STD)
    export_formats.release(out, ["timm"])
    (out / "timm" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (out / "timm").iterdir()}

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("\n  Failed to trace:\n  File x\n  File y")

    def half_written(_: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise ValueError("the archive is too large")

    said: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(export_formats.Failed) as error:
        patch.setattr("timm.create_model", breaks)
        patch.setattr("torch.export.save", half_written)
        export_formats.release(out, ["timm", "torch", "transformers"], said.append)
    assert error.value.lines == [
        f"{out}: timm cannot be written (RuntimeError: Failed to trace:)",
        f"{out}: torch cannot be written (ValueError: the archive is too large)",
    ]
    assert len(said) == 1 and said[0].startswith(f"{out}: opened again")
    assert {path.name: path.read_bytes() for path in (out / "timm").iterdir()} == before
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", "model.safetensors", "preprocessor_config.json", "timm"]
    )
    assert len(export_formats.release(out, ["timm", "torch", "transformers"])) == 3
    assert (out / "timm" / "notes.txt").read_text() == "mine"


def test_what_a_killed_export_has_left_goes_and_what_others_put_there_stays(tmp_path: Path):
    out = tmp_path / "out"
    for partial in (tmp_path / ".out.partial", out / ".official.partial"):
        partial.mkdir(parents=True)
    (tmp_path / ".out.partial" / "config.json").write_text("half")
    (out / ".official.partial" / "official.pth").write_text("half")
    export.write(out, vit(**DINOV3), ABOUT, MEAN, STD)
    (line,) = export_formats.release(out, ["official"])
    assert "official.pth: opened again" in line
    assert not (tmp_path / ".out.partial").exists() and not (out / ".official.partial").exists()
    for partial in (tmp_path / ".out.partial", out / ".official.partial"):
        partial.mkdir()
        (partial / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"\.out\.partial: is needed as a temporary folder, .*notes.txt"):
        export.write(out, vit(**DINOV3), ABOUT, MEAN, STD)
    with pytest.raises(UserError, match=r"\.official\.partial: is needed as a temporary folder, .*notes.txt"):
        export_formats.release(out, ["official"])
    assert all(
        (partial / "notes.txt").read_text() == "mine"
        for partial in (tmp_path / ".out.partial", out / ".official.partial")
    )


@pytest.mark.slow
def test_card_and_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    run = train(tiny_recipe("dinov2", shards, tmp_path / "run", "steps=2", "checkpoint=1", "model.depth=1"))
    folder = run / "export" / "2"
    text = (folder / "README.md").read_text()
    assert "pretrained with dinov2, step 2" in text and "48 samples in 1 shards, fingerprint `" in text
    assert (
        "prototypes: 64" in text
        and "The model of this step has not been evaluated" in text
        and str(tmp_path) in text.partition("## Recipe")[2]
    )
    row = {
        "step": 2,
        "model": "pretrained",
        "split": "test",
        "protocol": "knn",
        "metric": "accuracy",
        "value": 0.75,
        "count": 12,
    }
    floor = row | {"model": "pixels", "step": 0, "value": 0.25}
    rows = (row, row | {"value": 0.8125}, floor, row | {"model": "untrained", "step": 0, "value": 0.75})
    (run / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    text = model_card.write(folder).read_text()
    assert "| test | knn | accuracy | 0.8125 | 12 images |" in text
    assert (
        "- k-NN: 81.2% of 12 test images, 6.2 points above the untrained network (within ±22.1), 56.2 points above raw"
        " pixels\n" in text
    )
    assert "- objective: dinov2\n- encoder: vit\n- training images: 48\n- steps × batch: 2 × 16\n" in text
    (run / "results.jsonl").write_text(json.dumps(row | {"model": "convnext_tiny"}) + "\n")  # a further student's
    model_card.write(folder)
    assert "The model of this step has not been evaluated" in (folder / "README.md").read_text()
    fields = json.loads((folder / "config.json").read_text())
    fields["unlabeled"]["student"] = "convnext_tiny"
    (run / "export" / "convnext_tiny" / "2").mkdir(parents=True)
    (run / "export" / "convnext_tiny" / "2" / "config.json").write_text(json.dumps(fields))
    assert (
        "| test | knn | accuracy | 0.7500 | 12 images |"
        in model_card.write(run / "export" / "convnext_tiny" / "2").read_text()
    )
    wrong = parser().parse_args(["export", str(run), str(tmp_path / "target"), "--also", "tim"])
    with pytest.raises(UserError, match="no such export format; did you mean timm"):
        command_parser.call(wrong)
    assert not (tmp_path / "target").exists()
    args = parser().parse_args(["export", str(run), str(tmp_path / "target"), "--also", "timm", "torch"])
    command_parser.call(args)
    said = capsys.readouterr().out
    assert said.count("opened again") == 3 and (tmp_path / "target" / "timm" / "config.json").is_file()
    text = (tmp_path / "target" / "README.md").read_text()  # which lies outside of its run
    assert (
        "The model of this step has not been evaluated" in text and "fingerprint `" in text and "prototypes: 64" in text
    )
    (tmp_path / "target" / "timm" / "model.safetensors").unlink()

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("no way\nto do it")

    with monkeypatch.context() as patch:
        patch.setattr("timm.create_model", breaks)
        assert command_parser.call(args) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error")]  # beside transformers' progress
    assert errors == [f"error: {tmp_path / 'target'}: timm cannot be written (RuntimeError: no way)"]
    assert "model.pt2: opened again" in said.out and not (tmp_path / "target" / "timm" / "model.safetensors").exists()
    assert command_parser.call(args) == 0  # the same export: its forms are written again
    assert (tmp_path / "target" / "timm" / "model.safetensors").is_file()
    other = parser().parse_args(["export", str(run), str(tmp_path / "target"), "--step", "1"])
    with pytest.raises(UserError, match="target: exists and is not this export; name another folder"):
        command_parser.call(other)
