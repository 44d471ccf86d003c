"""k-NN and linear probe compared with naive formulas and scikit-learn, their edge cases, and the rows that they
write."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from common.errors import DataError, UserError
from common.progress import Progress
from eval import knn, linear, results, score_checks
from eval.features import Encoder, open_encoder
from eval.run import evaluate
from pretrain.metrics import Writer
from pretrain.models.build import build_model
from pretrain.models.families import ViT
from pretrain.models.layers import Features
from pretrain.run_folder.jsonl_rows import read_rows
from tests.conftest import call, unlabeled
from tests.tars import jpeg, write_tar


def clusters(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(300) % 5
    centers = torch.randn(5, 16, generator=torch.Generator().manual_seed(9)) * 2
    return centers[y] + spread * torch.randn(300, 16, generator=generator), y


@pytest.mark.slow
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


def test_knn_edge_cases():
    x, y = clusters(spread=0.1)
    q, truth = clusters(1, spread=0.1)
    assert torch.equal(knn.classify(x, y, q, 10, 0.07), truth)
    assert torch.equal(knn.classify(x[:5], y[:5], q, 200, 0.07), truth)  # k larger than the gallery
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert (knn.classify(x, shuffled, q, 10, 0.07) == truth).float().mean() < 0.4
    x, _ = clusters(spread=3.0)
    q, _ = clusters(1, spread=3.0)
    at_once = knn.nearest(x, q, 10)
    for chunk, gallery_chunk in ((7, 1000), (1000, 8), (7, 16), (7, 3)):  # chunks of the gallery with fewer rows than k
        in_parts = knn.nearest(x, q, 10, chunk, gallery_chunk)
        torch.testing.assert_close(in_parts[0], at_once[0])
        assert torch.equal(in_parts[1], at_once[1])


def test_accuracies():
    scores = knn.accuracies(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 2]), ["a", "b", "c"], ["a", "b"])
    assert scores == {"accuracy": 0.5, "balanced_accuracy": pytest.approx((2 / 3 + 0) / 2)}


@pytest.mark.slow
def test_linear_reaches_logistic_regression():
    x, y = clusters(spread=3.0)
    q, truth = clusters(1, spread=3.0)
    predicted, rate, _ = linear.classify(
        x * 100 + 7, y, q * 100 + 7, 5, linear.Config()
    )  # scale and offset have no effect
    theirs = LogisticRegression(max_iter=1000).fit(x, y).score(q, truth)
    assert (predicted == truth).float().mean() > theirs - 0.03 and rate in linear.Config().rates


def test_linear_heads_do_not_depend_on_each_other():
    x, y = clusters()
    together = linear.train(
        x, y, 5, linear.Config(steps=50, rates=[0.01, 0.1, 10.0]), torch.Generator().manual_seed(0)
    )[0][0]
    for i, rate in enumerate([0.01, 0.1, 10.0]):
        ((alone, _),) = linear.train(x, y, 5, linear.Config(steps=50, rates=[rate]), torch.Generator().manual_seed(0))
        torch.testing.assert_close(together[:, 5 * i : 5 * i + 5], alone, rtol=1e-4, atol=1e-4)


def test_linear_gradient_equals_autograd():
    x, y = clusters()
    cfg = linear.Config(steps=1, batch=300, rates=[0.5])
    ((weight, bias),) = linear.train(x, y, 5, cfg, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    w = (torch.randn(16, 5, generator=generator) * 0.01).requires_grad_()
    b = torch.zeros(5, requires_grad=True)
    pick = torch.randint(300, (300,), generator=generator)
    torch.nn.functional.cross_entropy(x[pick] @ w + b, y[pick]).backward()
    lr = 0.5 * 300 / 256
    torch.testing.assert_close(weight, w.detach() - lr * w.grad)
    torch.testing.assert_close(bias, b.detach() - lr * b.grad)


def test_linear_inputs_do_not_depend_on_each_other():
    x, y = clusters()
    cfg, columns = linear.Config(steps=50, rates=[0.1, 1.0]), [torch.arange(4), torch.tensor([2, 9, 15])]
    inputs = [linear.Inputs(1, False, each) for each in columns]
    together = linear.train(x, y, 5, cfg, torch.Generator().manual_seed(0), "cpu", inputs)
    for head, each in zip(together, inputs, strict=True):
        (alone,) = linear.train(x, y, 5, cfg, torch.Generator().manual_seed(0), "cpu", [each])
        torch.testing.assert_close(head, alone)
    assert [tuple(weight.shape) for weight, _ in together] == [(4, 10), (3, 10)]


def test_the_best_input_is_chosen():
    """Only some columns tell the classes apart. They are found on the held-out part, and on given samples."""
    x, y = clusters(spread=3.0)
    q, truth = clusters(1, spread=3.0)
    noise = [torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    x, q = torch.cat([noise[0], x], 1), torch.cat([noise[1], q], 1)
    inputs = [linear.Inputs(1, False, torch.arange(64)), linear.Inputs(0, True, torch.arange(64, 80))]
    alone = linear.fit(x[:, 64:], y, 5, linear.Config(steps=300))
    for select_on in (None, (q, truth)):
        probe = linear.fit(x, y, 5, linear.Config(steps=300), "cpu", inputs, select_on)
        assert probe.inputs.mean and (probe.predict(q) == truth).float().mean() > 0.6
        if select_on is None:
            assert (probe.predict(q) == alone.predict(q[:, 64:])).float().mean() > 0.9


def test_inputs_of_the_grid_are_stored_by_one_extraction(shards: Path, tmp_path: Path):
    backbone = build_model(ViT(dim=32, depth=3, heads=2, image_size=32, patch_size=8)).eval()
    encoder = Encoder(backbone, "vit", 32, [0.5] * 3, [0.5] * 3)
    encoder.cache, encoder.layers = tmp_path, 3
    found = encoder.labelled([str(shards)])
    batch = np.stack([encoder.read(encoder.check([str(shards)]), n) for n in range(5)])
    with torch.inference_mode():
        placed = encoder.part.place(torch.from_numpy(batch), encoder.device)
        outputs, last = backbone(placed, layers=3), backbone(placed)
    assert found.stored()[:5].shape == (5, 4 * 32)
    for columns, expected in (
        (encoder.columns(1, False), last.cls),
        (encoder.columns(3, False), outputs.cls.unflatten(1, (3, 32)).flip(1).flatten(1)),
        (encoder.columns(0, True), last.tokens.mean(1)),
        (encoder.columns(2, True), torch.cat([last.cls, outputs.cls[:, 32:64], last.tokens.mean(1)], 1)),
    ):
        torch.testing.assert_close(found.stored()[:5][:, columns], expected)
    torch.testing.assert_close(found.features[:5], last.cls)
    encoder.pool = "mean"
    assert torch.equal(Encoder.labelled(encoder, [str(shards)]).features[:5], found.features[:5])  # opened before
    encoder._sets.clear()
    torch.testing.assert_close(encoder.labelled([str(shards)]).features[:5], last.tokens.mean(1))
    assert len(list(tmp_path.iterdir())) == 1  # one set of features for both kinds of pooling
    grid = linear.inputs_of(encoder, linear.Config(layers=[1, 2, 7, 8]))
    assert [(each.layers, each.mean) for each in grid] == [
        *((n, False) for n in (1, 2, 3)),
        (0, True),
        *((n, True) for n in (1, 2, 3)),
    ]
    encoder.layers = 0
    assert linear.inputs_of(encoder, linear.Config()) == []


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
    with ThreadPoolExecutor() as pool:  # a scoring process that was not ended, and the one that was started after it
        new = [*pool.map(lambda _: results.append_new(tmp_path / "new" / "results.jsonl", rows), range(8))]
    assert sum(new) == 1 and read_rows(tmp_path / "new" / "results.jsonl") == rows
    more = [rows[0] | {"step": 7}]
    assert results.append_new(tmp_path / "new" / "results.jsonl", [*rows, *more])
    assert read_rows(tmp_path / "new" / "results.jsonl") == [*rows, *more]
    assert "pixels" in results.table(rows) and "100.0%" in results.table(rows)
    assert {row["note"] for row in rows} == {
        "48 of 48 query images are in the gallery, too"
    }  # so each image is its own neighbour
    assert results.table(rows).endswith("\nnote: 48 of 48 query images are in the gallery, too")


def test_samples_without_an_image_are_skipped_and_not_damaged(tmp_path: Path):
    members = [
        (f"{n:02d}.{kind}", data) for n in range(9) for kind, data in (("jpg", jpeg(n)), ("cls", b"ab"[n % 2 :][:1]))
    ]
    damaged, bare = ("10.jpg", jpeg()[:500]), [("11.txt", b"words"), ("11.cls", b"a"), ("12.cls", b"b")]
    write_tar(tmp_path / "a.tar", [*members, damaged, ("10.cls", b"a"), *bare])
    rows = evaluate("pixels", ["knn"], [str(tmp_path / "a.tar")], [str(tmp_path / "a.tar")], options={"knn": {"k": 1}})
    assert {(row["count"], row["left_out"], row["passed_over"]) for row in rows} == {
        (9, 2, 4)
    }  # the sums over both sets
    assert rows[0]["note"].startswith("10 of 10 query images are in the gallery, too")
    said = "note: of gallery and query, 2 damaged images were left out and 4 samples without images were skipped"
    assert results.lines(rows)[-1] == said and results.table(rows).endswith(said)


def test_features_are_extracted_once_and_pooled(shards: Path):
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
    with pytest.raises(UserError, match="is not an exported model"):
        evaluate(tmp_path, ["knn"], [str(shards)], [str(shards)])
    with pytest.raises(UserError, match=r"knn.kk = 3: no such key; did you mean k"):
        evaluate("pixels", ["knn"], [str(shards)], [str(shards)], options={"knn": {"kk": 3}})


# ---------------------------------------------------------------- meaningless scores
def labelled_tar(folder: Path, classes: str, first: int = 0) -> str:
    """Shards with one image of noise for each letter of `classes`, which is its class."""
    folder.mkdir()
    members = [
        (f"{n:02d}.{ending}", data)
        for n, name in enumerate(classes)
        for ending, data in (("jpg", jpeg(first + n, 40)), ("cls", name.encode()))
    ]
    write_tar(folder / "a.tar", members)
    return str(folder)


@pytest.mark.parametrize(
    ("gallery", "query", "first", "says"),
    [
        ("aabbccaabbcc", "aabbccaabbcc", 20, None),
        ("aabbccaabbcc", "bbccaabbccaa", 2, "10 of 12 query images are in the gallery, too"),
        ("aabbccaabbcc", "abcabcabcabz", 20, "1 of 12 query images are of classes that the gallery lacks"),
        ("aabbccaabbcc", "aaaaaaaaaaaa", 20, "the query images are all of one class (a)"),
        ("aabbccaabbcc", "b", 20, "only 1 query image, so one answer is 100 points"),
        ("aabbccaabbcc", "abcab", 20, "only 5 query images, so one answer is 20 points"),
    ],
)
def test_problems_of_the_data_are_noted_beside_a_score(
    gallery: str, query: str, first: int, says: str | None, tmp_path: Path
):
    sets = [labelled_tar(tmp_path / "gallery", gallery)], [labelled_tar(tmp_path / "query", query, first)]
    for row in evaluate("pixels", ["knn", "linear"], *sets, options={"linear": {"steps": 2}}):
        assert says in row["note"] if says else "note" not in row
        assert not says or results.lines([row])[-1] == f"note: {row['note']}"


@pytest.mark.parametrize(
    ("gallery", "query", "says"),
    [
        ("aaaa", "aabb", "gallery: its 4 images are all of one class (a), so every answer would be the same"),
        ("a", "a", "gallery: its 1 images are all of one class (a)"),
        ("aabb", "ccde", "query: has the classes c, d, e, but the gallery"),
    ],
)
def test_meaningless_scores_are_refused(gallery: str, query: str, says: str, tmp_path: Path):
    sets = [labelled_tar(tmp_path / "gallery", gallery)], [labelled_tar(tmp_path / "query", query, 20)]
    for protocol in ("knn", "linear"):
        with pytest.raises(DataError, match=re.escape(says)):
            evaluate("pixels", [protocol], *sets)


def test_equal_and_infinite_features(tmp_path: Path):
    sets = [labelled_tar(tmp_path / "gallery", "aabb")], [labelled_tar(tmp_path / "query", "abababababab", 20)]

    def constant(name: str, value: float) -> Encoder:
        def features(images: torch.Tensor) -> Features:
            vector = torch.full((len(images), 3), value)
            return Features(vector, vector[:, None], vector[:, None, :0], (1, 1))

        encoder = Encoder(features, name, 32, [0.5] * 3, [0.5] * 3)
        encoder.cache = tmp_path / "cache"
        return encoder

    note = score_checks.judge(constant("ones", 1), *sets, "images")
    assert note == "the features of all gallery images are the same"
    encoder = constant("nans", math.nan)
    with pytest.raises(DataError, match="nans: its features of 4 of 4 images are not finite"):
        score_checks.judge(encoder, *sets, "images")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("knn.k=0", "knn.k = 0: must be 1 or more"),
        ("knn.temperature=0", "knn.temperature = 0.0: must be above 0"),
        ("linear.steps=0", "linear.steps = 0: must be 1 or more"),
        ("linear.rates=[]", "linear.rates = []: write one"),
        ("linear.layers=[]", "linear.layers = []: write one"),
        ("linear.pooling=[max]", "linear.pooling[0] = 'max': expected one of cls, mean, cls+mean"),
        ("linear.rates=[0.1, -1]", "linear.rates[1] = -1.0: must be above 0"),
        ("linear.hold_out=1", "linear.hold_out = 1.0: must be above 0 and below 1"),
        ("image_size=big", "image_size = 'big': write pixels"),
        ("gallery=7", "gallery = 7: write shards"),
    ],
)
def test_options_out_of_range(option: str, says: str, shards: Path):
    with pytest.raises(UserError, match=re.escape(says)):
        call("eval", "pixels", "knn", "linear", f"gallery={shards}", f"query={shards}", option)


def test_rows_are_written_to_the_given_file(shards: Path, tmp_path: Path, capsys):
    data = [f"gallery={shards}", f"query={shards}"]
    for _ in range(2):
        call("eval", "pixels", "knn", *data, "--out", tmp_path / "new" / "scores.jsonl")
    assert [row["metric"] for row in read_rows(tmp_path / "new" / "scores.jsonl")] == [
        "accuracy",
        "balanced_accuracy",
    ] * 2
    said = capsys.readouterr().out
    assert "note: 48 of 48 query images are in the gallery, too" in said
    (tmp_path / "mine.bin").write_bytes(b"mine")
    for path in (tmp_path / "mine.bin", tmp_path, tmp_path / "mine.bin" / "x.jsonl"):
        with pytest.raises(UserError, match=r"write the name of a file that ends in .jsonl|cannot be written"):
            call("eval", "pixels", "knn", *data, "--out", path)
    assert (tmp_path / "mine.bin").read_bytes() == b"mine"


def test_students_are_named_in_the_progress_line(tmp_path: Path):
    writer = object.__new__(Writer)
    writer.run, writer.length, writer.last_val_loss = tmp_path, 0, None  # no text
    row = {"step": 0, "loss": 1.0, "samples_per_second": 5.0, "data_share": 0.0}
    score = {"protocol": "knn", "split": "val", "metric": "accuracy", "step": 4, "seconds": 1.0}

    def line(*scored: tuple[str, float], **more: str) -> str:
        writer.progress = Progress("train", 10, stream=io.StringIO())
        (tmp_path / "results.jsonl").unlink(missing_ok=True)
        results.append(tmp_path / "results.jsonl", [score | more | {"model": m, "value": v} for m, v in scored])
        writer._update_progress(row)
        return writer.progress.stream.getvalue()

    assert "k-NN so far 50.0% (step 4)" in line(("pixels", 0.9), ("untrained", 0.1), ("pretrained", 0.5))
    assert "k-NN so far pretrained 50.0%, vit_tiny 20.0%, small 30.0% (step 4)" in line(
        ("untrained", 0.1), ("vit_tiny", 0.1), ("pretrained", 0.5), ("vit_tiny", 0.2), ("small", 0.3)
    )
    assert "50.0% (step 4, with a note)" in line(("pretrained", 0.5), note="few")


def test_long_names_do_not_run_together():
    row = {
        "step": 1,
        "split": "test",
        "protocol": "knn",
        "metric": "accuracy",
        "value": 0.5,
        "count": 9,
        "unit": "texts",
    }
    names = ("x", "convnextv2_femto.fcmae_ft_in1k", "bad\nname")
    rows = [row | {"model": name} for name in names] + [row | {"model": "x", "metric": "a_metric_of_a_very_long_name"}]
    lines = results.lines(rows)
    assert len(lines) == 4 and {line.index("knn") for line in lines} == {len(names[1]) + 2}
    assert {line.index("0.5000") for line in lines} == {len(names[1]) + 2 + 10 + 30}
    table = results.table(rows[:3]).splitlines()
    assert len(table) == 4 and {line.index("50.0%") for line in table[1:]} == {len(names[1]) + 2 + 5}
    assert {len(line) for line in table} == {len(names[1]) + 2 + 10}


@pytest.mark.slow
def test_command_line(shards: Path):
    done = unlabeled("eval", "pixels", "knn", f"gallery={shards}", f"query={shards}", "knn.k=1")
    assert done.returncode == 0 and "1.0000   (48 images)" in done.stdout, done.stderr
    between = unlabeled(
        "eval", "pixels", "--out", shards.parent / "x.jsonl", "knn", f"gallery={shards}", f"query={shards}"
    )
    assert between.returncode == 0 and (shards.parent / "x.jsonl").is_file(), between.stderr
    bad = unlabeled("eval", "pixels", "knn", "galery=x")
    assert bad.returncode == 2 and "'galery': no such option" in bad.stderr
