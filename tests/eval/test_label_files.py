"""A part of the classes, and several right labels for an image, by hand examples in the layouts of ImageNet-A, -R and
ReaL."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from eval import classifier, robustness
from eval.features import Encoder
from pretrain.interchange.layouts.class_head import Classifier
from pretrain.models.layers import Features
from tests.tars import write_tar

NAMES = ["n01", "n02", "n03"]  # class n is right for an image whose largest colour is n
QUERIES = [  # (key, colour, label)
    ("n02/ILSVRC2012_val_00000001", (200, 150, 50), "n02"),
    ("n02/ILSVRC2012_val_00000002", (50, 200, 150), "n02"),
    ("0000002-ILSVRC2012_val_00000003", (200, 50, 150), "n03"),
    ("0000003-ILSVRC2012_val_00000004", (50, 200, 150), "n03"),
]
REAL = [[0, 1], [2], [], [1, 2]]
BY_NAME = {f"ILSVRC2012_val_0000000{n}": [NAMES[c] for c in labels] for n, labels in enumerate(REAL, 1)}
CASES = [  # (content of the file of classes, of labels, accuracy, number of images that count)
    ("", None, 1 / 4, 4),
    ("query", None, 3 / 4, 4),  # n02, n02, n03, n02 are answered
    ("n02 goldfish\n\nn03 great white shark\n", None, 3 / 4, 4),
    ("n01\nn02\n", None, 1 / 2, 2),  # n01, n02 for the images of n02
    ("", REAL, 2 / 3, 3),  # n01, n02, n02 for those that have labels
    ("", BY_NAME, 2 / 3, 3),
    ("query", REAL, 2 / 3, 3),  # n02, n02, n02
]


def mean_colour(images: torch.Tensor) -> Features:
    colour = images.mean((2, 3))
    return Features(colour, colour[:, None], colour[:, None, :0], (1, 1))


def shards(path: Path, samples: list[tuple[str, tuple[int, int, int], str]]) -> list[str]:
    members = []
    for key, colour, label in samples:
        out = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(out, "PNG")
        members += [(f"{key}.png", out.getvalue()), (f"{key}.cls", label.encode())]
    write_tar(path, members)
    return [str(path)]


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    found = Encoder(mean_colour, "mean_colour", 8, [0.5] * 3, [0.5] * 3, device="cpu")
    found.cache = found.folder = tmp_path
    monkeypatch.setattr(classifier, "classifier_of", lambda folder: Classifier(torch.eye(3), torch.zeros(3), NAMES))
    return found


def options(folder: Path, classes: str, labels: object) -> dict[str, str]:
    found = {}
    if classes:
        (folder / "classes.txt").write_text(classes)
        found["classes"] = classes if classes == "query" else str(folder / "classes.txt")
    if labels is not None:
        (folder / "real.json").write_text(json.dumps(labels))
        found["labels"] = str(folder / "real.json")
    return found


@pytest.mark.parametrize(("classes", "labels", "accuracy", "count"), CASES)
def test_accuracy(classes: str, labels: object, accuracy: float, count: int, encoder: Encoder, tmp_path: Path):
    query, chosen = shards(tmp_path / "query.tar", QUERIES), options(tmp_path, classes, labels)
    scores = classifier.run(encoder, [], query, classifier.Config(**chosen))
    assert (scores["accuracy"], scores["count"]) == (pytest.approx(accuracy), count)
    assert ("balanced_accuracy" in scores) == (labels is None)
    pure = [
        (f"{n}-{m}", tuple(230 if c == n else 20 + m for c in range(3)), NAMES[n]) for n in range(3) for m in range(8)
    ]
    cfg = robustness.Config(corruptions=[], **chosen)
    cfg.linear.steps, cfg.linear.batch, cfg.linear.hold_out = 60, 16, 0.2
    scores = robustness.run(encoder, shards(tmp_path / "gallery.tar", pure), query, cfg)  # type: ignore[arg-type]
    assert scores["accuracy"] == pytest.approx(accuracy) == 1 - scores["clean_error"]
    assert scores.get("scored") == (count if chosen else None)


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        ("n02 goldfish\nn2 shark", None, r"classifier.classes: .*classes.txt: line 2 is 'n2 shark'.*did you mean n02"),
        ("n02", None, r"classes.txt: names 1 classes; write one class in each line, two or more"),
        ("", [[0]], r"real.json: has no labels of 'n02/ILSVRC2012_val_00000002'.*named ILSVRC2012_val_00000001"),
        ("", [[0], [3], [], []], r"classifier.labels: .*real.json: names the class 3, which is not among the 3"),
        ("", [0, 1], r"real.json: ILSVRC2012_val_00000001 has 0; a list of numbers or names of classes is expected"),
        ("", 1, r"real.json: holds neither a list of lists nor"),
    ],
)
def test_files_that_do_not_fit(classes: str, labels: object, message: str, encoder: Encoder, tmp_path: Path):
    query, chosen = shards(tmp_path / "query.tar", QUERIES), options(tmp_path, classes, labels)
    with pytest.raises(UserError, match=message):
        classifier.run(encoder, [], query, classifier.Config(**chosen))
    with pytest.raises(UserError, match=r"classifier.classes = .*none: cannot be read \(No such file or directory\)"):
        classifier.run(encoder, [], query, classifier.Config(classes=str(tmp_path / "none")))
