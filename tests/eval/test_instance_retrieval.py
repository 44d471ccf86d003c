"""Instance retrieval: average precision against a hand-made example and the published definition, and rankings of
shards with lists, boxes and labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError, UserError
from eval.features import open_encoder
from eval.instance_retrieval import Config, average_precision, means, precision_at, ranks, run
from eval.run import evaluate
from tests.eval.test_dense import _webp, patches
from tests.tars import write_tar


def published(places: np.ndarray) -> float:
    """The mean over positives of the precision before and at each of them."""
    total = 0.0
    for j, place in enumerate(places):
        before = 1.0 if place == 0 else j / place
        total += (before + (j + 1) / (place + 1)) / (2 * len(places))
    return total


def test_average_precision():
    by_hand = ((0 + 1 / 2) / 2 + (1 / 4 + 2 / 5) / 2 + (2 / 6 + 3 / 7) / 2) / 3  # positives at ranks 2, 5 and 7
    assert average_precision(np.array([1, 4, 6])) == pytest.approx(by_hand) == pytest.approx(0.319, abs=5e-4)
    assert average_precision(np.array([0, 1, 2])) == 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = np.sort(rng.permutation(50)[: rng.integers(1, 9)])
        assert average_precision(places) == pytest.approx(published(places))
    assert precision_at(np.array([1, 4, 6]), 5) == 2 / 5
    assert precision_at(np.array([0, 1]), 10) == 1  # the last positive ends the count


def test_junk_is_not_ranked():
    similarities = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.6])
    assert ranks(similarities, [3, 4], [0, 1]).tolist() == [1, 2]
    assert ranks(similarities, [3, 4], []).tolist() == [2, 3]
    found = means([np.array([0]), np.array([], int)])
    assert found == {"map": 1, "mp1": 1, "mp5": 1, "mp10": 1}  # a query without positives is skipped
    assert means([np.array([], int)]) == {}


def test_lists_of_queries(tmp_path: Path):
    """Images of one colour: the ranking is known. The object of a query is in its box."""
    colors = {"red": (250, 10, 10), "pink": (250, 60, 60), "salmon": (250, 110, 90), "blue": (10, 10, 250)}
    members = [(f"g-{name}.webp", _webp(np.full((32, 32, 3), rgb, np.uint8))) for name, rgb in colors.items()]
    write_tar(tmp_path / "gallery.tar", members)
    image = np.full((64, 64, 3), (10, 10, 250), np.uint8)
    image[8:40, 8:40] = colors["red"]
    about = {"bbox": [8, 8, 40, 40], "easy": ["g-salmon"], "hard": ["g-blue"], "junk": ["g-red"]}
    query = [("q.webp", _webp(image)), ("q.json", json.dumps(about).encode())]
    write_tar(tmp_path / "query.tar", query)
    sets = [str(tmp_path / "gallery.tar")], [str(tmp_path / "query.tar")]
    scores = run(patches(tmp_path / "cache"), *sets, Config())
    # without red: pink, salmon, blue; without salmon as well for "hard", without blue as well for "easy"
    assert scores["map_easy"] == pytest.approx(published(np.array([1])))
    assert scores["map"] == scores["map_medium"] == pytest.approx(published(np.array([1, 2])))
    assert scores["map_hard"] == pytest.approx(published(np.array([1])))
    assert (scores["mp1_easy"], scores["count"], scores["gallery_count"]) == (0, 1, 4)
    whole = run(patches(tmp_path / "cache"), *sets, Config(box=False))
    assert whole["map_hard"] > scores["map_hard"]  # most of the image is blue
    several = run(patches(tmp_path / "cache"), *sets, Config(scales=[1.0, 0.5]))
    assert several["map"] == scores["map"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # features of each size of the images
    about = {"bbox": [8, 8, 40, 40], "easy": ["g-salmon"], "hard": ["g-pink"]}  # red, pink, salmon, blue
    write_tar(tmp_path / "query.tar", [query[0], ("q.json", json.dumps(about).encode())])
    scores = run(patches(tmp_path / "cache"), *sets, Config())
    assert scores["map_easy"] == pytest.approx(published(np.array([1])))  # without pink
    assert scores["map"] == pytest.approx(published(np.array([1, 2])))
    write_tar(tmp_path / "query.tar", [query[0], ("q.json", json.dumps({"easy": ["g-grey"]}).encode())])
    with pytest.raises(DataError, match=r"lists 'g-grey' \(1 keys in all\), which is the key of no readable sample"):
        run(patches(tmp_path / "cache"), *sets, Config())


def test_labels_without_lists(shards: Path):
    rows = evaluate("pixels", ["instance_retrieval"], [str(shards)], [str(shards)])
    value = {row["metric"]: row["value"] for row in rows}
    assert value.keys() == {"map", "mp1", "mp5", "mp10"} and rows[0]["count"] == 48
    encoder, _ = open_encoder("pixels")
    found = encoder.labelled([str(shards)])
    x = torch.nn.functional.normalize(found.features[:], dim=1)
    expected = []
    for n, row in enumerate(x @ x.T):
        order = [i for i in row.argsort(descending=True).tolist() if i != n]
        expected.append(published(np.flatnonzero(found.classes[order] == found.classes[n])))
    assert value["map"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_features_of_all_sizes_are_deleted(shards: Path, tmp_path: Path):
    encoder = patches(tmp_path)
    run(encoder, [str(shards)], [str(shards)], Config(scales=[1.0, 0.5]))
    assert len(list(tmp_path.iterdir())) == 2
    encoder.delete_features()
    assert not list(tmp_path.iterdir())


def test_errors(shards: Path):
    with pytest.raises(UserError, match="instance_retrieval ranks images, but this model reads texts"):
        run(open_encoder("bytes")[0], [str(shards)], [str(shards)], Config())
    with pytest.raises(UserError, match="pixels: gives features of another width for images of another size"):
        run(open_encoder("pixels")[0], [str(shards)], [str(shards)], Config(scales=[1, 0.5]))
    with pytest.raises(UserError, match=r"instance_retrieval.scales = \[\]"):
        run(open_encoder("pixels")[0], [str(shards)], [str(shards)], Config(scales=[]))
