"""Logistic regression compared with scikit-learn, and few-shot ridge regression with numpy's least squares."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from common.errors import UserError
from eval import fewshot, linear, logistic
from eval.feature_rows import FeatureRows
from eval.run import evaluate
from eval.score_checks import is_at_edge
from tests.eval.test_protocols import clusters


@pytest.mark.parametrize("cost", [1e-3, 1.0])
def test_logistic_equals_scikit_learn(cost: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On features that are read from a file in chunks."""
    x, y = clusters(spread=3.0)
    monkeypatch.setattr(logistic, "CHUNK", 77)
    np.save(tmp_path / "x.npy", x.numpy())
    rows = FeatureRows(tmp_path / "x.npy", np.arange(len(x)))
    weight, bias, _ = logistic.fit(rows, y, 5, cost, logistic.Config(tolerance=1e-10))
    theirs = LogisticRegression(C=cost, tol=1e-10, max_iter=5000).fit(x.double().numpy(), y.numpy())
    torch.testing.assert_close(weight.T, torch.from_numpy(theirs.coef_), rtol=1e-4, atol=1e-6)
    offset = torch.from_numpy(theirs.intercept_)  # only differences between classes matter
    torch.testing.assert_close(bias - bias.mean(), offset - offset.mean(), rtol=1e-4, atol=1e-6)
    q, _ = clusters(1, spread=3.0)
    assert (logistic.predict(q, weight, bias).numpy() == theirs.predict(q.double().numpy())).all()


def test_logistic_chooses_the_cost_on_held_out_features():
    """The choice has the best held-out accuracy of solutions that scikit-learn finds separately."""
    x, y = clusters(spread=3.0)
    cfg = logistic.Config(costs=[1e2, 1e-4, 1e-1], hold_out=0.3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:90], order[90:]
    score = {}
    for cost in cfg.costs:
        theirs = LogisticRegression(C=cost, tol=1e-8, max_iter=5000).fit(x[rest].double().numpy(), y[rest].numpy())
        score[cost] = theirs.score(x[held_out].double().numpy(), y[held_out].numpy())
    assert len(set(score.values())) > 1
    chosen = max(sorted(score), key=score.__getitem__)
    assert logistic.choose_cost(x, y, 5, cfg) == (chosen, score[chosen] > score[1e-1])


def test_rows_are_read_in_the_order_of_the_file():
    class Ordered(torch.Tensor):
        def __getitem__(self, rows):
            assert isinstance(rows, slice) or bool((rows.diff() > 0).all())
            return self.as_subclass(torch.Tensor)[rows]

    x, y = clusters(spread=3.0)
    logistic.choose_cost(x.as_subclass(Ordered), y, 5, logistic.Config(costs=[1e-4, 1e-3], iterations=2))


def test_what_limits_a_score_is_in_its_note(shards: Path):
    sets = [[str(shards)], [str(shards)]]
    for options, remarks in (
        ({"costs": [1e-3], "iterations": 1}, {"not_converged"}),
        ({"costs": [1e-3]}, set()),
    ):
        rows = evaluate("pixels", ["logistic"], *sets, options={"logistic": options})
        for key, text in logistic.REMARKS.items():
            assert all((text in row["note"]) == (key in remarks) for row in rows)
        assert {row["metric"] for row in rows} == {"accuracy", "balanced_accuracy", "cost"}
    rates = {"steps": 30, "rates": [1e-9, 1e-1, 1e-8]}
    assert linear.REMARKS["at_edge"] in evaluate("pixels", ["linear"], *sets, options={"linear": rates})[0]["note"]


def test_the_edge_of_a_grid():
    assert is_at_edge([1, 2, 3]) and is_at_edge([3, 2, 3])
    assert not is_at_edge([1, 3, 3]) and not is_at_edge([1, 3]) and not is_at_edge([3])


@pytest.mark.parametrize("n", [9, 40])  # fewer and more samples than features
def test_ridge_equals_least_squares(n: int):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, 16)), rng.normal(size=(n, 3))
    stacked = np.concatenate([x, 7.0**0.5 * np.eye(16)]), np.concatenate([y, np.zeros((16, 3))])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0]
    torch.testing.assert_close(fewshot.solve(torch.tensor(x), torch.tensor(y), 7.0), torch.tensor(expected))


def test_shots_of_each_class():
    classes = torch.tensor([0] * 30 + [2] * 3 + [1] * 12)[
        torch.randperm(45, generator=torch.Generator().manual_seed(1))
    ]
    chosen = [fewshot.choose(classes, 5, seed) for seed in (0, 0, 1)]
    for numbers in chosen:
        assert Counter(classes[numbers].tolist()) == {0: 5, 1: 5, 2: 3}  # class 2 has three samples
        assert numbers.unique().tolist() == numbers.tolist()
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])


def test_few_shots_classify_clusters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fewshot, "CHUNK", 77)
    x, y = clusters(spread=0.1)
    q, truth = clusters(1, spread=0.1)
    chosen = fewshot.choose(y, 1, 0)
    assert torch.equal(fewshot.classify(x[chosen], y[chosen], q * 1.0, 5, 1024.0), truth)
    # scale and offset have no effect, also not that of the constant feature
    moved = fewshot.classify(x[chosen] * 100 + 7, y[chosen], q * 100 + 7, 5, 1024.0)
    assert torch.equal(moved, truth)


def test_few_shots_of_classes_of_unequal_size_need_the_bias():
    """Compared with numpy's least squares on standardised features and the constant feature."""
    x, y = clusters(spread=3.0)
    chosen = (y < 2) & (torch.arange(300) % 30 < 21) | (y == 2)
    x, y = x[chosen][20:32].double(), y[chosen][20:32]
    q, _ = clusters(1, spread=3.0)
    mean, std = x.numpy().mean(0), x.numpy().std(0) + 1e-5  # as in big_vision
    rows, queries = (np.c_[(each.numpy() - mean) / std, np.full(len(each), 100.0)] for each in (x, q.double()))
    stacked = np.r_[rows, 32.0 * np.eye(17)], np.r_[2.0 * np.eye(3)[y] - 1, np.zeros((17, 3))]
    expected = (queries @ np.linalg.lstsq(*stacked, rcond=None)[0]).argmax(1)
    assert (fewshot.classify(x.float(), y, q, 3, 1024.0).numpy() == expected).all()
    without = (queries[:, :-1] @ np.linalg.lstsq(stacked[0][:, :-1], stacked[1], rcond=None)[0]).argmax(1)
    assert (without != expected).any()


def test_rows(shards: Path):
    options = {"fewshot": {"shots": [1, 3, 99], "seeds": 2}, "logistic": {"costs": [1e-3, 1e-2]}}
    rows = evaluate("pixels", ["fewshot", "logistic"], [str(shards)], [str(shards)], options=options)
    value = {(row["protocol"], row["metric"]): row["value"] for row in rows}
    few = {metric for protocol, metric in value if protocol == "fewshot"}
    assert few == {"accuracy", "accuracy_1", "std_1", "accuracy_3", "std_3", "shots"}  # no class has 99 images
    assert value["fewshot", "shots"] == 3
    assert value["fewshot", "accuracy"] == value["fewshot", "accuracy_3"] > 0.6
    assert value["logistic", "accuracy"] > 0.9 and value["logistic", "cost"] in (1e-3, 1e-2)


@pytest.mark.parametrize(
    ("protocol", "options", "says"),
    [
        ("fewshot", {"shots": []}, "fewshot.shots = []: write one number"),
        ("fewshot", {"shots": [0]}, "fewshot.shots[0] = 0: must be 1 or more"),
        ("fewshot", {"shots": [25]}, "fewshot.shots = [25]: the largest class of the gallery has 24 samples"),
        ("logistic", {"costs": []}, "logistic.costs = []: write one value of C"),
        ("logistic", {"costs": [0]}, "logistic.costs[0] = 0.0: must be above 0"),
    ],
)
def test_errors(protocol: str, options: dict, says: str, shards: Path):
    with pytest.raises(UserError, match=re.escape(says)):
        evaluate("pixels", [protocol], [str(shards)], [str(shards)], options={protocol: options})
