"""Zero-shot classification and retrieval, on embeddings whose scores are known and on the export of a real run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, DataError, UserError
from data_pipeline.shards import index
from eval import report, report_captions
from eval.periodic_scoring import check
from eval.retrieval import captions, ranked
from eval.run import evaluate
from pretrain.train import train
from tests.conftest import captioned, tiny_recipe
from tests.tars import jpeg, write_tar


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CLIP that has learned to tell the two classes apart by their captions, whose lengths differ."""
    folder = tmp_path_factory.mktemp("clip") / "run"
    options = ["steps=40", "optim.lr=3e-3", "objective.crop_scale=0.5", "log=10"]
    return train(tiny_recipe("clip", shards, folder, *options))


def test_the_classes_are_those_of_the_names(run: Path, shards: Path):
    data, templates = [str(captioned(shards))], [f"a photo of a {{}}, part {n}" for n in range(7)]
    options: dict[str, dict[str, Any]] = {"zeroshot": {"templates": templates}}  # the captions of the training
    rows = {row["metric"]: row for row in evaluate(run / "export" / "40", ["zeroshot"], [], data, options=options)}
    assert rows["accuracy"]["count"] == 48 and "top5" not in rows
    assert rows["accuracy"]["value"] > 0.75  # chance: 0.5
    options["zeroshot"]["names"] = ["flower", "china"]  # the names of the classes, exchanged
    (wrong, *_) = evaluate(run / "export" / "40", ["zeroshot"], [], data, options=options)
    assert wrong["value"] == pytest.approx(1 - rows["accuracy"]["value"])
    found = {row["metric"]: row["value"] for row in evaluate(run / "export" / "40", ["retrieval"], [], data)}
    assert found.keys() == {f"{way}_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert found["text_to_image_1"] <= found["text_to_image_5"] <= found["text_to_image_10"] <= 1


def test_the_report_shows_the_captions_that_are_found(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report_captions, "captions", lambda *given: [captions(*given)[0] + "<q>"])
    whole = report.write(run).read_text()
    page = whole.partition("<h2>Captions</h2>")[2]
    assert "<q>" not in whole and page.count("&lt;q&gt;") == 8 * 4
    places = [int(place) for place in re.findall(r"its own caption, place (\d+)", page)]
    assert "Training images" in page and "among those of 48 images" in page and len(places) == 8
    for card, place in zip(page.split('<div class="card captioned">')[1:], places, strict=True):
        own, *found = re.findall(r"<(?:p|li)[^>]*>(.*?) <small>", card.partition("</ol>")[0])
        similarities = [float(value) for value in re.findall(r"<small>(-?\d\.\d+)</small>", card)]
        assert len(found) == 3 and similarities == sorted(similarities, reverse=True)
        assert (f"✓ {own}" in found) or place > 3


def test_recall_of_embeddings_that_are_known():
    """Three images; the first one has two captions, one of which is closest to it."""
    images = torch.eye(3)
    texts = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.0, 0.7, 0.3], [0.6, 0.2, 0.2]])
    ranks = ranked(images, texts, torch.tensor([0, 0, 1, 2]))
    assert ranks["image_to_text"].tolist() == [0, 1, 1]
    assert ranks["text_to_image"].tolist() == [1, 0, 0, 2]
    alike = ranked(torch.ones(3, 3), torch.ones(3, 3), torch.arange(3))
    assert [rank.tolist() for rank in alike.values()] == [[2, 2, 2], [2, 2, 2]]


def test_several_captions_of_a_field_and_samples_without_one(run: Path, tmp_path: Path):
    rows: list[dict[str, Any]] = [{"c": ["a photo of a flower", "red"]}, {"c": "a photo of a china"}, {"d": "none"}]
    members = [
        m for n, row in enumerate(rows) for m in ((f"{n}.jpg", jpeg(n)), (f"{n}.json", json.dumps(row).encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    scored = evaluate(
        run / "export" / "40", ["retrieval"], [], [str(tmp_path)], options={"retrieval": {"captions": "c"}}
    )
    assert (scored[0]["count"], scored[0]["passed_over"], scored[0]["left_out"]) == (2, 1, 0)
    with pytest.raises(ConfigError, match=r"holds .* and no caption"):
        evaluate(run / "export" / "40", ["retrieval"], [], [str(tmp_path)])


def test_more_than_five_classes(run: Path, tmp_path: Path):
    members = [m for n in range(12) for m in ((f"{n:02d}.jpg", jpeg(n)), (f"{n:02d}.cls", b"%d" % (n % 6)))]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match="have no names of classes"):
        evaluate(run / "export" / "40", ["zeroshot"], [], [str(tmp_path)])
    index.write(tmp_path, lambda line: None, extra={"classes": ["china", "flower", "a", "b", "c", "d"]})
    rows = {row["metric"]: row["value"] for row in evaluate(run / "export" / "40", ["zeroshot"], [], [str(tmp_path)])}
    assert rows["accuracy"] <= rows["top5"] <= 1
    with pytest.raises(DataError, match=r"zeroshot.names: has 2 names, but .* has 6 classes"):
        few = {"zeroshot": {"names": ["a", "b"]}}
        evaluate(run / "export" / "40", ["zeroshot"], [], [str(tmp_path)], options=few)


def test_what_cannot_be_scored_is_refused(run: Path, shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds no text model beside its image model"):
        evaluate("pixels", ["zeroshot"], [], [str(captioned(shards))])
    with pytest.raises(UserError, match=r"zeroshot.templates: 'a photo' has no \{\}"):
        options = {"zeroshot": {"templates": ["a photo"]}}
        evaluate(run / "export" / "40", ["zeroshot"], [], [str(captioned(shards))], options=options)
    scored = [f"eval.val={captioned(shards)}", "eval.quick=[zeroshot,retrieval]"]
    check(tiny_recipe("clip", shards, tmp_path / "run", *scored))
    with pytest.raises(UserError, match="mae trains no model of captions"):
        check(tiny_recipe("mae", shards, tmp_path / "run", *scored))
