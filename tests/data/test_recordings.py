"""Shards from folders and lists of recordings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from data_pipeline.build.build_shards import build
from data_pipeline.build.sources import Options
from data_pipeline.formats.waveforms import decode
from data_pipeline.shards.samples import Samples
from launch import preview_audio
from launch.preview import GAP
from pretrain.ops.cross_entropy import IGNORED
from pretrain.recipes import recipe
from tests.conftest import unlabeled
from tests.data.building import quiet
from tests.data.sounds import encoded, recordings, tone, wav


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings of two speakers, one of which is long, and one that cannot be decoded."""
    for name, data in {
        "ann/a.wav": wav(tone(300, 0.5)),
        "ann/b.flac": encoded("flac", 500, 1),
        "bob/c.wav": wav(tone(700, 2.5, 8000), 8000),
        "bob/d.wav": wav(tone())[:2000],
    }.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


def rows(target: Path) -> list[dict]:
    samples = Samples([str(target)], say=quiet)
    return [samples.read(n) for n in range(len(samples))]


def test_a_folder_of_recordings(folder: Path, tmp_path: Path):
    """Files are stored as they are; labels are the folders."""
    summary = build(folder, tmp_path / "out", say=quiet, workers=1)
    assert (summary["kind"], summary["classes"], summary["members"]["wav"]) == ("audio", ["ann", "bob"], 2)
    (bad,) = summary["bad"]
    assert bad == {"path": "bob/d.wav", "reason": "ends after 2000 bytes, but its header states 32044"}
    first, second, third = rows(tmp_path / "out")
    assert (
        first["wav"] == (folder / "ann/a.wav").read_bytes() and second["flac"] == (folder / "ann/b.flac").read_bytes()
    )
    assert third["cls"] == b"1" and json.loads(third["json"]) == {"path": "bob/c.wav"}


def test_long_recordings_are_cut_into_equal_pieces(folder: Path, tmp_path: Path):
    """Also if the pieces of a recording lie in several shards; together they are the recording."""
    whole = tone(700, 2.5, 8000)
    for megabytes in (1.0, 0.02):
        target = tmp_path / f"out{megabytes}"
        summary = build(folder, target, megabytes, options=Options(seconds=1.0), say=quiet, workers=1)
        assert summary["samples"] == 5 and (summary["shards"] > 2) == (megabytes < 1) and len(summary["bad"]) == 1
        samples = rows(target)
        assert samples[0]["wav"] == (folder / "ann/a.wav").read_bytes()
        assert samples[1]["flac"] == (folder / "ann/b.flac").read_bytes()  # a second is not longer than a second
        parts = [decode(each["flac"], 8000) for each in samples[2:]]
        assert np.array_equal(np.concatenate(parts), whole) and {len(part) for part in parts} == {6666, 6667}
        facts = [json.loads(each["json"]) for each in samples[2:]]
        assert [each["begin"] for each in facts] == [0, 0.833, 1.667] and facts[0]["path"] == "bob/c.wav"
        assert all(each["cls"] == b"1" for each in samples[2:])


def test_a_list_of_recordings(folder: Path, tmp_path: Path):
    """With texts and labels; rows that name no recording are left out."""
    lines = [
        {"audio_filepath": "ann/a.wav", "text": "one", "label": "x", "duration": 0.5},
        {"audio_filepath": "bob/c.wav", "text": "two", "label": "y"},
        {"audio_filepath": "bob/c.wav"},
        {"audio_filepath": "bob/e.txt"},
        {"audio_filepath": "gone.wav", "label": "x"},
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = build(folder / "list.jsonl", tmp_path / "out", say=quiet, workers=1)
    assert (summary["kind"], summary["classes"], summary["samples"]) == ("audio", ["x", "y"], 2)
    assert {bad["path"] for bad in summary["bad"]} == {"list.jsonl:3", "list.jsonl:4", "gone.wav"}
    first, second = rows(tmp_path / "out")
    assert (first["txt"], first["cls"], second["txt"]) == (b"one", b"0", b"two")
    assert json.loads(first["json"]) == {"path": "ann/a.wav", "label": "x", "duration": 0.5}
    (folder / "list.csv").write_text("path,sentence\nann/a.wav,hello\n")
    summary = build(folder / "list.csv", tmp_path / "csv", options=Options(seconds=0.25), say=quiet, workers=1)
    assert [each["txt"] for each in rows(tmp_path / "csv")] == [b"hello"] * 2 and summary["kind"] == "audio"


def test_the_command(folder: Path, tmp_path: Path):
    done = unlabeled("shards", "build", folder, tmp_path / "out", "--seconds", "1", "--workers", "1")
    assert done.returncode == 0 and "5 samples" in done.stdout and "2 classes, 1 left out" in done.stdout, done.stdout
    stats = unlabeled("shards", "stats", tmp_path / "out", "--sheet", tmp_path / "sheet.png")
    assert "5 recordings, 4.0 s in all" in stats.stdout.replace("00 s", "0 s"), stats.stdout + stats.stderr
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(DataError, match=r"--seconds 0\.01: write the length of the longest recording, at least 0\.1"):
        build(folder, tmp_path / "other", options=Options(seconds=0.01), say=quiet)


@pytest.mark.parametrize("name", ["bestrq_cpu", "audio_mae_cpu"])
def test_a_preview_draws_spectrograms_and_what_is_masked(name: str, tmp_path: Path):
    cfg = recipe.load(name, [f"data.train={recordings(tmp_path)}", "data.batch=16"])
    page = np.array(Image.open(preview_audio.preview(cfg, tmp_path / "x.png", rows=3)))
    scale, bands = 1200 // {"bestrq_cpu": 98, "audio_mae_cpu": 96}[name], 80 if name == "bestrq_cpu" else 64
    assert page.shape[0] == 3 * (scale * bands + GAP) + GAP
    sample = {"audio": np.random.default_rng(0).normal(size=(12, 8)), "targets": np.array([0, IGNORED, 0])}
    (drawn,) = preview_audio.spectrograms(sample, 0)
    (plain,) = preview_audio.spectrograms({"audio": sample["audio"]}, 0)
    assert drawn.shape == (8, 12, 3) and np.array_equal(drawn[:, 4:8], plain[:, 4:8])
    assert np.array_equal(drawn[:, :4], (plain[:, :4] * 0.25).astype(np.uint8)) and (drawn[:, 8:] <= 64).all()
    image = {"image": sample["audio"].T[None], "keep": np.array([0])}  # the patch of the low bands and the first frames
    (drawn,) = preview_audio.spectrograms(image, 4)
    assert np.array_equal(drawn[4:, :4], plain[4:, :4]) and (drawn[:4] <= 64).all() and (drawn[:, 4:] <= 64).all()
