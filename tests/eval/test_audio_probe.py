"""Scores of frozen encoders on labelled recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import DataError, UserError
from data_pipeline.parts.audio import Audio
from data_pipeline.shards.samples import Samples
from eval import report
from eval.embed import embed
from eval.features import open_encoder
from eval.run import evaluate
from pretrain.interchange import export
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.data.sounds import tone, wav
from tests.tars import write_tar

MODELS: dict[str, Any] = {
    "conformer": families.Conformer(mels=20, dim=32, depth=1, heads=2, kernel=5),
    "spectrogram_vit": families.SpectrogramViT(image_size=32, patch_size=8, dim=32, depth=1, heads=2),
}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled shards: 24 recordings of a low or of a high tone, of different lengths and loudness, in noise, and one
    that cannot be decoded."""
    folder, rng = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    members = [("bad.wav", wav(tone())[:1000]), ("bad.cls", b"0")]
    for n in range(24):
        sound = tone((400, 900)[n % 2] * rng.uniform(0.9, 1.1), rng.uniform(0.3, 1.3), amplitude=rng.uniform(1e3, 1e4))
        sound = sound + rng.normal(0, 300, len(sound))
        members += [(f"{n:02d}.wav", wav(sound.astype(np.int16))), (f"{n:02d}.cls", b"%d" % (n % 2))]
    write_tar(folder / "a.tar", members)
    return folder


def exported(folder: Path, name: str) -> Path:
    cfg = MODELS[name]
    cfg.name = name
    torch.manual_seed(0)
    audio = {"sample_rate": 16000, "seconds": 1.0, "mels": cfg.mels}
    audio |= {"mean": [12.0], "std": [5.0]} if name == "spectrogram_vit" else {}
    pool = "cls" if name == "conformer" else "mean"
    export.write(folder / name, build_model(cfg), {"step": 1, "objective": "x", "pool": pool, "audio": audio})
    return folder / name


@pytest.mark.parametrize("name", [*MODELS, "log_mel"])
def test_recordings_are_scored(name: str, notes: Path, tmp_path: Path):
    model = exported(tmp_path, name) if name in MODELS else name
    sets, nearest = [str(notes)], {"knn": {"k": 1}}
    rows = evaluate(model, ["knn", "logistic"], sets, sets, options=nearest, cache=tmp_path / "cache")
    scores = {(row["protocol"], row["metric"]): row for row in rows}
    for protocol, least in (("knn", 1.0), ("logistic", 0.5)):  # the nearest one is the recording itself
        row = scores[protocol, "accuracy"]
        assert row["value"] >= least and (row["unit"], row["count"], row["left_out"]) == ("recordings", 24, 2)


def test_features_do_not_depend_on_the_batch_nor_on_padding(notes: Path, tmp_path: Path):
    """A recording that is shorter than a cut has the features of its own tokens."""
    encoder, _ = open_encoder(str(exported(tmp_path, "conformer")))
    samples = Samples([str(notes)])
    inputs = [encoder.read(samples, n) for n in range(1, 9)]
    together = encoder.pooled(inputs)
    alone = torch.cat([encoder.pooled([each]) for each in inputs])
    assert torch.allclose(together, alone, atol=1e-5)
    waveform, frames = min(inputs, key=lambda each: each[1])
    part = Audio(seconds=len(waveform) / 16000, mels=20)
    direct = part.place(torch.from_numpy(waveform)[None], torch.device("cpu"), frames=torch.tensor([frames]))
    with torch.no_grad():
        expected = encoder.backbone(direct).tokens.mean(1)
    assert frames < 98 and torch.allclose(encoder.pooled([(waveform, frames)]), expected, atol=1e-5)
    long = max(range(1, 25), key=lambda n: len(samples.read(n)["wav"]))
    assert len(encoder.read(samples, long)[0]) == 16000  # the middle of a longer one


def test_recordings_are_embedded(notes: Path, tmp_path: Path):
    """The mean of the tokens does not include padding either."""
    model = exported(tmp_path, "conformer")
    for output in ("cls", "mean"):
        assert embed(str(model), [str(notes)], tmp_path / output, output) == (24, 1)
    cls, mean = (np.load(tmp_path / output / "part-00000.npy") for output in ("cls", "mean"))
    assert cls.shape == (24, 32) and np.array_equal(cls, mean)
    with pytest.raises(UserError, match="reads recordings, whose numbers of tokens differ; write cls or mean"):
        embed(str(model), [str(notes)], tmp_path / "patches", "patches")


@pytest.mark.parametrize("name", ["segmentation", "depth", "bits_per_byte", "attentive"])
def test_protocols_for_other_samples_are_refused(name: str, notes: Path):
    with pytest.raises(UserError, match=r"log_mel: reads recordings, which|log_mel: attentive scores models that"):
        evaluate("log_mel", [name], [str(notes)], [str(notes)])


def test_shards_without_recordings_are_refused(shards: Path):
    encoder, _ = open_encoder("log_mel")
    with pytest.raises(DataError, match=r"holds \.jpg.* and no recording; members are read"):
        encoder.check([str(shards)])


@pytest.mark.slow
def test_a_run_is_scored_and_reported(notes: Path, tmp_path: Path):
    sets = [f"eval.{name}=[{notes}]" for name in ("gallery", "val", "test")]
    more = [*sets, "eval.final=[knn]", f"eval.cache={tmp_path / 'cache'}", "steps=2"]
    run = train(tiny_recipe("bestrq", notes, tmp_path / "run", *more))
    rows = read_rows(run / "results.jsonl")
    assert {(row["model"], row["split"]) for row in rows} == {
        *(("untrained", split) for split in ("val", "test")),
        *(("pretrained", split) for split in ("val", "test")),
        ("log_mel", "test"),
    }
    page = report.write(run).read_text()
    assert "24 recordings" in page and "log-mel statistics and the untrained network are baselines" in page
