"""Accuracy by groups: hand-made examples, folds that keep a value together, and shards with metadata."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold

from common.errors import DataError, UserError
from eval import group
from eval.run import evaluate
from tests.tars import jpeg, write_tar


def test_scores_by_group():
    correct = torch.tensor([True, True, False, True, False, False])
    scores, small = group.by_group(correct, ["a", "a", "a", "b", "b", "c"], 2)
    assert scores == {
        "worst_group": 0.5,
        "mean_group": pytest.approx((2 / 3 + 1 / 2) / 2),
        "average": 0.5,
        "groups": 2,
    }
    assert small and not group.by_group(correct, ["a"] * 6, 2)[1]
    with pytest.raises(DataError, match=r"no group has group.least = 9 queries; the largest one has 6"):
        group.by_group(correct, ["a"] * 6, 9)


def test_folds_keep_a_value_together():
    values = [f"p{n}" for n in np.random.default_rng(0).integers(0, 17, 200) ** 2 // 16]
    folds = group.folds_of(values, 4)
    assert all(len({int(f) for f, v in zip(folds, values, strict=True) if v == value}) == 1 for value in set(values))
    sizes = sorted(torch.bincount(folds).tolist())
    theirs = sorted(len(test) for _, test in GroupKFold(4).split(values, groups=values))
    assert sizes == theirs
    with pytest.raises(UserError, match=r"group.folds = 3: the field has 2 values"):
        group.folds_of(["a", "b"], 3)


def patients(path: Path, first: int, count: int, further: int = 0) -> str:
    """Four images of each patient. The class is bright or dark; at site B the two are exchanged."""
    members = []
    for n in range(first, first + count):
        site = "A" if n % 3 else "B"
        for k in range(4):
            bright = k % 2
            level = (200 if bright == (site == "A") else 40) + n % 7
            key = f"{n:03d}-{k}"
            image = np.full((32, 32, 3), level, np.uint8)
            fields = {"patient": f"p{n}", "site": site}
            members += [(f"{key}.jpg", _jpeg(image)), (f"{key}.cls", str(bright).encode())]
            members.append((f"{key}.json", json.dumps(fields).encode()))
    write_tar(path, members)
    return str(path)


def _jpeg(image: np.ndarray) -> bytes:
    import simplejpeg

    return simplejpeg.encode_jpeg(image, quality=95)


def test_the_worst_group_and_separated_patients(tmp_path: Path):
    sets = [patients(tmp_path / "a.tar", 0, 12)], [patients(tmp_path / "b.tar", 8, 12)]  # patients 8 to 11 are in both
    options = {"group": {"field": "site", "least": 4, "classifier": "knn", "k": 5}}
    value = {row["metric"]: row["value"] for row in evaluate("pixels", ["group"], *sets, options=options)}
    assert value["groups"] == 2 and value["worst_group"] < value["mean_group"] and value["worst_group"] < 0.5
    apart = {"group": options["group"] | {"apart": "patient"}}
    rows = evaluate("pixels", ["group"], *sets, options=apart)
    assert group.REMARKS["shared"] in rows[0]["note"]
    both = [patients(tmp_path / "c.tar", 0, 12)]
    with pytest.raises(DataError, match=r"without the samples whose patient is also in the query.*group.folds=5"):
        evaluate("pixels", ["group"], both, both, options=apart)
    folded = {"group": apart["group"] | {"folds": 4}}
    rows = evaluate("pixels", ["group"], both, both, options=folded)
    assert "note" not in rows[0] and {row["metric"] for row in rows} == {
        "worst_group",
        "mean_group",
        "average",
        "groups",
    }
    with pytest.raises(UserError, match=r"group.folds splits one set"):
        evaluate("pixels", ["group"], *sets, options=folded)


def test_no_patient_helps_to_classify_itself(tmp_path: Path):
    """One class for each patient's site: its own other images would classify it, those of other patients do not."""
    members = []
    for n in range(12):
        for k in range(4):
            fields = json.dumps({"patient": f"p{n}", "site": "A"}).encode()
            image = jpeg(n, 32)
            members += [
                (f"{n:02d}-{k}.jpg", image),
                (f"{n:02d}-{k}.cls", b"ab"[n % 2 :][:1]),
                (f"{n:02d}-{k}.json", fields),
            ]
    write_tar(tmp_path / "a.tar", members)
    sets = [[str(tmp_path / "a.tar")]] * 2
    common = {"field": "site", "classifier": "knn", "k": 3}
    for apart, folds, leaks in (("", 0, True), ("patient", 4, False)):
        options = {"group": common | {"apart": apart, "folds": folds}}
        rows = evaluate("pixels", ["group"], *sets, options=options)
        value = {row["metric"]: row["value"] for row in rows}
        assert (
            (value["average"] == 1)
            == leaks
            == ("48 of 48 query images are in the gallery, too" in rows[0].get("note", ""))
        )


def test_errors(tmp_path: Path, shards: Path):
    both = [patients(tmp_path / "a.tar", 0, 6)]
    for options, says in (
        ({}, r"group.field is empty; write a field of the .json members: patient, site"),
        ({"field": "sex"}, r"has no sex \(group.field\); it has patient, site"),
    ):
        with pytest.raises(UserError, match=says):
            evaluate("pixels", ["group"], both, both, options={"group": options})
    with pytest.raises(UserError, match="folds = 1: write 2 or more"):
        evaluate("pixels", ["group"], both, both, options={"group": {"folds": 1}})
