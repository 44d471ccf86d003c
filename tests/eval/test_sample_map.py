"""The report's map of texts: which samples are on it, at which checkpoints, and what is on no map."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError
from data_pipeline.build.build_shards import build
from eval import feature_map
from eval.features import open_encoder
from eval.sample_map import MAX_SAMPLES, features_of, sample_map
from pretrain.recipes.recipe import Recipe
from tests.conftest import tiny_recipe
from tests.tars import write_tar

CLASSES = {"<b>digits": string.digits, "letters": string.ascii_letters}
EXPORTS = {0: Path("bytes"), 20: Path("bytes"), 40: Path("bytes")}  # byte frequencies in the place of exports


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 texts of two classes, which alternate, in the order of the shard."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    rows = [
        {"text": "".join(rng.choice([*letters], 200)), "label": name}
        for _ in range(20)
        for name, letters in CLASSES.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(folder / "rows.jsonl", folder / "shards")
    return folder / "shards"


def recipe(shards: Path, run: Path, *overrides: str, name: str = "bert") -> Recipe:
    return tiny_recipe(name, shards, run, *overrides)


def test_texts_of_a_class_are_together(texts: Path, shards: Path, tmp_path: Path):
    last, _ = open_encoder("bytes", device="cpu")
    named = recipe(shards, tmp_path, f"eval.gallery={texts}", f"eval.test={texts}")
    source = sample_map(named, EXPORTS, last, "cpu")
    assert re.findall(r"<h3>([^<]*)</h3>", source) == ["untrained", "pretrained, step 40"]
    assert "t-SNE of the pooled features of 40 texts" in source and "<b>digits" not in source
    for card in source.split("<h3>")[1:]:
        found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)".*?<title>([^<]*)</title>', card)
        assert [label for *_, label in found] == ["&lt;b&gt;digits", "letters"] * 20
        places = torch.tensor([(float(x), float(y)) for x, y, _ in found])
        distances = torch.cdist(places, places).fill_diagonal_(torch.inf)
        assert all((n - int(nearest)) % 2 == 0 for n, nearest in enumerate(distances.argmin(1)))


def test_samples_are_spread_over_the_set(texts: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MAX_SAMPLES, "texts", 14)
    encoder, _ = open_encoder("bytes", device="cpu")
    samples = encoder.check([str(texts)])
    features, labels = features_of(encoder, samples)
    numbers = range(0, 40, 3)
    expected = torch.cat([encoder.pooled([encoder.read(samples, number)]) for number in numbers])
    assert labels == [encoder.label(samples, number) for number in numbers] and torch.equal(features, expected)


def test_what_is_on_no_map(texts: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_map, "STEPS", 1)
    last, _ = open_encoder("bytes", device="cpu")
    data = [f"eval.gallery={texts}", f"eval.val={texts}"]
    assert sample_map(recipe(shards, tmp_path), EXPORTS, last, "cpu") == ""  # without labelled data
    assert sample_map(recipe(shards, tmp_path, *data, name="gpt"), EXPORTS, last, "cpu") == ""  # it writes text
    assert sample_map(recipe(shards, tmp_path, *data), {40: Path("bytes")}, last, "cpu").count("<svg") == 1
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n')
    build(tmp_path / "rows.jsonl", tmp_path / "one")
    one = [f"eval.gallery={tmp_path / 'one'}", f"eval.test={tmp_path / 'one'}"]
    assert sample_map(recipe(shards, tmp_path, *one), EXPORTS, last, "cpu") == ""  # of a single class
    (tmp_path / "damaged").mkdir()
    write_tar(tmp_path / "damaged" / "0.tar", [("0.txt", b"\xff\xfe"), ("0.cls", b"1")])
    with pytest.raises(DataError, match="none of the samples that were tried can be read and has a label"):
        features_of(last, last.check([str(tmp_path / "damaged")]))
