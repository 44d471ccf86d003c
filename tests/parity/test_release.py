"""Further forms of an export are opened by what they are for, and compared; a model card tells what the run's files tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.cli import parser
from pretrain import card, export, release, weights
from pretrain.errors import UserError
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.parity.test_models import ABOUT, MEAN, STD, resnet, vit
from tests.parity.test_weights import DINOV3, convnext

MODELS = {
    "dinov3": lambda: vit(**DINOV3),
    "registers": lambda: vit(registers=2, layer_scale=0.5, mask_token=True),
    "convnext": lambda: convnext(image_size=64),
}


@pytest.mark.parametrize("name", MODELS)
def test_forms(tmp_path: Path, name: str):
    wide = {"dim": 128, "heads": 2} if name != "convnext" else {}  # the official layout's heads are 64 wide
    model = (
        MODELS[name]()
        if not wide
        else vit(**(DINOV3 if name == "dinov3" else {"registers": 2, "layer_scale": 0.5}), **wide)
    )
    export.write(tmp_path / "out", model, ABOUT, MEAN, STD)
    lines = release.release(tmp_path / "out", ["transformers", "timm", "official", "torch"])
    assert len(lines) == 4 and all("opened again" in line for line in lines)
    usual = {"dinov3": 1e-5, "registers": 1e-6}
    assert ("has no place for the norms' eps" in lines[2]) == (name in usual and model.cfg.norm_eps != usual[name])
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
    (line,) = release.release(tmp_path / "out", ["onnx"])
    assert "model.onnx: opened again" in line


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export.write(tmp_path / "out", resnet(stem="small"), ABOUT, MEAN, STD)
    for form, message in [
        ("tim", "'tim': no such form; did you mean"),
        ("timm", "is not written for timm"),
        ("official", "ViTs and ConvNeXts only"),
        ("transformers", "no ResNet with a small stem"),
    ]:
        with pytest.raises(UserError, match=message):
            release.release(tmp_path / "out", [form])
    export.write(tmp_path / "out", vit(**DINOV3), ABOUT, MEAN, STD)

    def wrong(folder: Path, encoder: nn.Module, *_: object) -> tuple:
        return "there", (torch.zeros(2, 32), None)

    monkeypatch.setitem(release.FORMS, "torch", wrong)
    with pytest.raises(UserError, match="there: torch gives other features from it"):
        release.release(tmp_path / "out", ["torch"])
    monkeypatch.setitem(release.FORMS, "torch", lambda *_: ("there", None))
    assert "were not compared" in release.release(tmp_path / "out", ["torch"])[0]


@pytest.mark.slow
def test_card_and_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = train(tiny_recipe("dinov2", shards, tmp_path / "run", "steps=2", "checkpoint=1"))
    folder = run / "export" / "2"
    text = (folder / "README.md").read_text()
    assert "pretrained with dinov2, step 2" in text and "48 samples in 1 shards, fingerprint `" in text
    assert "prototypes: 64" in text and "None were taken" in text and str(tmp_path) in text.partition("## Recipe")[2]
    row = {
        "step": 2,
        "model": "pretrained",
        "split": "test",
        "protocol": "knn",
        "metric": "accuracy",
        "value": 0.75,
        "count": 12,
    }
    (run / "results.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"value": 0.8125}) + "\n")
    card.write(folder)
    assert "| test | knn | accuracy | 0.8125 | 12 |" in (folder / "README.md").read_text()
    (run / "results.jsonl").write_text(json.dumps(row | {"model": "convnext_tiny"}) + "\n")  # a further student's
    card.write(folder)
    assert "None were taken" in (folder / "README.md").read_text()
    fields = json.loads((folder / "config.json").read_text())
    fields["unlabeled"]["student"] = "convnext_tiny"
    (run / "export" / "convnext_tiny" / "2").mkdir(parents=True)
    (run / "export" / "convnext_tiny" / "2" / "config.json").write_text(json.dumps(fields))
    assert "| test | knn | accuracy | 0.7500 | 12 |" in card.write(run / "export" / "convnext_tiny" / "2").read_text()
    wrong = parser().parse_args(["export", str(run), str(tmp_path / "target"), "--also", "tim"])
    with pytest.raises(UserError, match="no such form; did you mean timm"):
        wrong.main(wrong)
    assert not (tmp_path / "target").exists()
    args = parser().parse_args(["export", str(run), str(tmp_path / "target"), "--also", "timm", "torch"])
    args.main(args)
    said = capsys.readouterr().out
    assert said.count("opened again") == 3 and (tmp_path / "target" / "timm" / "config.json").is_file()
    text = (tmp_path / "target" / "README.md").read_text()  # which lies outside of its run
    assert "None were taken" in text and "fingerprint `" in text and "prototypes: 64" in text
    with pytest.raises(UserError, match="target: is there already; name another folder"):
        args.main(args)
