"""k-NN and linear probe against naive formulas and scikit-learn, their edges, and the rows they write."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from data_pipeline.storage import DataError
from eval import knn, linear, results
from eval.features import Encoder, open_encoder
from eval.run import evaluate
from pretrain.errors import UserError
from pretrain.run_folder import read_rows
from tests.conftest import unlabeled


def clusters(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(300) % 5
    centers = torch.randn(5, 16, generator=torch.Generator().manual_seed(9)) * 2
    return centers[y] + spread * torch.randn(300, 16, generator=generator), y


def test_knn_is_the_weighted_vote_of_the_paper():
    x, y = clusters(spread=3.0)
    q, _ = clusters(1, spread=3.0)
    got = knn.classify(x, y, q, k=7, temperature=0.07, chunk=11)
    for i, query in enumerate(q.double()):
        cosine = [float(query @ row / query.norm() / row.norm()) for row in x.double()]
        votes: dict[int, float] = defaultdict(float)
        for j in sorted(range(len(x)), key=lambda j: -cosine[j])[:7]:
            votes[int(y[j])] += math.exp(cosine[j] / 0.07)
        assert int(got[i]) == max(votes, key=votes.__getitem__)


def test_knn_edges():
    x, y = clusters(spread=0.1)
    q, truth = clusters(1, spread=0.1)
    assert torch.equal(knn.classify(x, y, q, 10, 0.07), truth)
    assert torch.equal(knn.classify(x[:5], y[:5], q, 200, 0.07), truth)  # k beyond the gallery
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert (knn.classify(x, shuffled, q, 10, 0.07) == truth).float().mean() < 0.4
    assert torch.equal(knn.classify(x, y, q, 10, 0.07, chunk=7), knn.classify(x, y, q, 10, 0.07, chunk=1000))


def test_accuracies():
    scores = knn.accuracies(torch.tensor([0, 0, 1, 1]), ["a", "a", "a", "c"], ["a", "b"])
    assert scores == {"accuracy": 0.5, "balanced_accuracy": pytest.approx((2 / 3 + 0) / 2)}


def test_linear_reaches_logistic_regression():
    x, y = clusters(spread=3.0)
    q, truth = clusters(1, spread=3.0)
    predicted, rate = linear.classify(x * 100 + 7, y, q * 100 + 7, 5, linear.Config())  # scale and offset do not matter
    theirs = LogisticRegression(max_iter=1000).fit(x, y).score(q, truth)
    assert (predicted == truth).float().mean() > theirs - 0.03 and rate in linear.Config().rates


def test_linear_heads_do_not_depend_on_each_other():
    x, y = clusters()
    together = linear.train(
        x, y, 5, linear.Config(steps=50, rates=[0.01, 0.1, 10.0]), torch.Generator().manual_seed(0)
    )[0]
    for i, rate in enumerate([0.01, 0.1, 10.0]):
        alone = linear.train(x, y, 5, linear.Config(steps=50, rates=[rate]), torch.Generator().manual_seed(0))[0]
        torch.testing.assert_close(together[:, 5 * i : 5 * i + 5], alone, rtol=1e-4, atol=1e-4)


def test_linear_gradient_is_autograds():
    x, y = clusters()
    cfg = linear.Config(steps=1, batch=300, rates=[0.5])
    weight, bias = linear.train(x, y, 5, cfg, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    w = (torch.randn(16, 5, generator=generator) * 0.01).requires_grad_()
    b = torch.zeros(5, requires_grad=True)
    pick = torch.randint(300, (300,), generator=generator)
    torch.nn.functional.cross_entropy(x[pick] @ w + b, y[pick]).backward()
    lr = 0.5 * 300 / 256
    torch.testing.assert_close(weight, w.detach() - lr * w.grad)
    torch.testing.assert_close(bias, b.detach() - lr * b.grad)


def test_pixels_and_rows(shards: Path, tmp_path: Path):
    rows = evaluate(
        "pixels", ["knn", "linear"], [str(shards)], [str(shards)], options={"knn": {"k": 1}, "linear": {"steps": 100}}
    )
    assert {(r["model"], r["protocol"], r["metric"]) for r in rows} >= {
        ("pixels", "knn", "accuracy"),
        ("pixels", "linear", "accuracy"),
    }
    assert rows[0]["value"] == 1.0 and rows[0]["count"] == 48  # each image is its own nearest neighbour
    results.append(tmp_path / "results.jsonl", rows)
    results.append(tmp_path / "results.jsonl", rows[:1])
    assert read_rows(tmp_path / "results.jsonl") == [*rows, rows[0]]
    assert "pixels" in results.table(rows) and "100.0%" in results.table(rows)


def test_features_are_extracted_once_and_pooled_as_asked(shards: Path):
    encoder, _ = open_encoder("pixels")
    assert encoder.labelled([str(shards)]) is encoder.labelled([str(shards)])
    images = np.zeros((2, 3, 32, 32), np.uint8)
    assert encoder.pooled(images).shape == (2, 3 * 32 * 32)
    mean = Encoder(encoder.backbone, "x", 32, [0, 0, 0], [1, 1, 1], pool="mean")
    assert torch.equal(mean.pooled(images), torch.zeros(2, 3 * 32 * 32))


def test_errors(tmp_path: Path, shards: Path):
    with pytest.raises(UserError, match=r"'kn': no such protocol; did you mean knn"):
        evaluate("pixels", ["kn"], [str(shards)], [str(shards)])
    with pytest.raises(DataError, match="no labelled shards are named"):
        evaluate("pixels", ["knn"], [], [])
    with pytest.raises(UserError, match="is no exported model"):
        evaluate(tmp_path, ["knn"], [str(shards)], [str(shards)])
    with pytest.raises(UserError, match=r"knn.kk = 3: no such key; did you mean k"):
        evaluate("pixels", ["knn"], [str(shards)], [str(shards)], options={"knn": {"kk": 3}})


@pytest.mark.slow
def test_command_line(shards: Path):
    done = unlabeled("eval", "pixels", "knn", f"gallery={shards}", f"query={shards}", "knn.k=1")
    assert done.returncode == 0 and "1.0000   (48 images)" in done.stdout, done.stderr
    bad = unlabeled("eval", "pixels", "knn", "galery=x")
    assert bad.returncode == 2 and "'galery': no such option" in bad.stderr
