"""CKA against a naive formula, and the comparison of a teacher with its students: equal models, worse ones, and what is
written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError, UserError
from eval import feature_rows, model_comparison
from eval.cka import cka
from eval.features import Encoder
from launch.command_parser import HomePath
from launch.model_commands import compare
from pretrain.models.layers import Features
from tests.eval.test_report import make_run
from tests.tars import jpeg, write_tar


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    """From the kernel matrices [N, N] without their diagonals (Song et al., 2012, equation 5)."""

    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        n = len(k)
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        ones = np.ones(n)
        whole = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return (whole - 2 * (ones @ k @ l @ ones) / (n - 2)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_cka(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_rows, "CHUNK", 7)
    monkeypatch.setattr("eval.cka.CHUNK", 7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype(np.float32) + 3
    y = (x @ rng.normal(size=(6, 9)) + rng.normal(size=(40, 9))).astype(np.float32)
    first, second = torch.from_numpy(x), torch.from_numpy(y)
    assert cka(first, second) == pytest.approx(naive_cka(x.astype(np.float64), y.astype(np.float64)), abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert cka(first, first) == 1 and cka(first, 5 * first @ rotation + 1) == pytest.approx(1, abs=1e-5)
    many = torch.randn(
        60, 500, generator=torch.Generator().manual_seed(0)
    )  # unrelated, with more features than samples
    assert abs(cka(many[:, :250], many[:, 250:])) < 0.05
    assert cka(first, torch.ones(40, 3)) == 0
    with pytest.raises(DataError, match="3 samples: CKA needs 4"):
        cka(first[:3], second[:3])


def test_what_a_student_keeps():
    teacher = {"knn": {"accuracy": 0.8}, "depth": {"rmse": 0.5}, "health": {"alpha": 1.0}}
    student = {"knn": {"accuracy": 0.6}, "depth": {"rmse": 1.0}, "health": {"alpha": 2.0}}
    assert model_comparison._kept(teacher, student) == {"knn": 0.75, "depth": 0.5}


def test_models_take_turns_and_a_slow_one_is_slower(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_comparison, "MIN_SECONDS", 0.01)
    calls: list[str] = []

    def model(name: str, work: int) -> Encoder:
        def features(images: torch.Tensor) -> Features:
            calls.append(name)
            for _ in range(work):
                torch.ones(300, 300) @ torch.ones(300, 300)
            flat = images.flatten(1)[:, :4]
            return Features(flat, flat.unsqueeze(1), flat.unsqueeze(1)[:, :0], (1, 1))

        return Encoder(features, name, 8, [0.5] * 3, [0.5] * 3)

    fast, slow = model_comparison.measure([model("fast", 0), model("slow", 20)])
    assert slow[0] > 2 * fast[0] and slow[1] < fast[1] / 2
    order = "".join(name[0] for name in calls)
    assert order.replace("ff", "f").count("fs") >= model_comparison.ROUNDS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("compared")
    return make_run(root / "large", shards, "model.dim=64"), make_run(root / "small <b>", shards, "model.depth=1")


def test_a_teacher_and_its_students(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model_comparison, "MIN_SECONDS", 0)
    teacher, student = runs
    words = [str(teacher / "export" / "40"), str(student), "knn", "fewshot", "fewshot.seeds=1", f"cache={tmp_path}"]
    (tmp_path / ".recipe.yaml").write_text("a file of the user")
    files = HomePath(str(tmp_path / "a.json")), HomePath(str(tmp_path / "a.html"))
    compare(str(teacher / "export" / "40"), words, json=files[0], html=files[1])
    assert (tmp_path / ".recipe.yaml").read_text() == "a file of the user"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["large/40", "large/40", "small <b>/40"]
    assert lines[0].split() == ["parameters", "MB", "ms", "samples/s", "CKA", "k-NN", "fewshot"]
    found = json.loads((tmp_path / "a.json").read_text())
    first, same, other = found["models"]
    assert found["query"] == json.loads(json.dumps(found["gallery"])) and found["batch"] == model_comparison.BATCH
    for key in ("cka", "scores", "kept", "parameters", "megabytes"):
        assert first[key] == same[key]
    assert same["cka"] == 1 and same["kept"] == {"knn": 1, "fewshot": 1} and same["cka_samples"] == 48
    assert 0 < other["cka"] < 1 and other["parameters"] < first["parameters"] and other["latency_ms"] > 0
    assert other["megabytes"] == pytest.approx(4e-6 * other["parameters"], abs=1e-3)
    expected = other["scores"]["fewshot"]["accuracy"] / first["scores"]["fewshot"]["accuracy"]
    assert other["kept"]["fewshot"] == pytest.approx(expected, abs=1e-5)
    page = (tmp_path / "a.html").read_text()
    assert "small &lt;b&gt;/40" in page and "small <b>" not in page and page.count("<svg") == 4
    assert page.count("<circle") == 12


def test_names_are_escaped_and_plots_show_the_costs(tmp_path: Path):
    def model(name: str, parameters: int, latency: float, accuracy: float) -> model_comparison.Compared:
        scores = {"knn": {"accuracy": accuracy}}
        return model_comparison.Compared(
            f"<q>{name}", parameters, 1.0, 32, latency, 10.0, 0.5, 48, scores, {"knn": 0.5}, [f"<q>note of {name}"]
        )

    models = [model("large", 4_000_000, 20.0, 0.8), model("small", 1_000_000, 5.0, 0.6)]
    page = model_comparison.write_page(models, tmp_path / "a.html", "<q>about").read_text()
    shown = ("&lt;q&gt;large and 1 more", "&lt;q&gt;about", "&lt;q&gt;note of large", "<th>&lt;q&gt;small</th>")
    assert "<q>" not in page and all(text in page for text in shown)
    for cost in ("4 million parameters", "1 million parameters", "20 ms for one sample", "5 ms for one sample"):
        assert f", {cost}</title>" in page
    size, latency = page.split('<div class="card"><h3>')[1:]
    places = [[float(x) for x in re.findall(r'<circle class="s\d" cx="([\d.]+)"', plot)] for plot in (size, latency)]
    assert all(first > second for first, second in places)  # the large model is to the right


def test_samples_that_are_too_few_are_refused_before_the_scores(runs: tuple[Path, Path], tmp_path: Path):
    write_tar(tmp_path / "a.tar", [(f"{n}.{e}", x) for n in range(3) for e, x in (("jpg", jpeg(n)), ("cls", b"0"))])
    models = [str(run / "export" / "40") for run in runs]
    with pytest.raises(DataError, match="3 samples: CKA needs 4 or more"):
        model_comparison.compare(models, ["knn"], [], [str(tmp_path / "a.tar")], device="cpu", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["knn"], "no students are named"),
        (["STUDENT", "--json", "a.txt"], r"--json a.txt: write the name of a file that ends in .json"),
        (["STUDENT", "--json", "/none/a.json"], "its folder does not exist"),
        (["log_mel"], "log_mel: reads recordings, but .* reads images"),
        (["STUDENT", "query=[]"], "no data are named"),
        (["STUDENT", "logistic", "logistic.save=probe"], "logistic.save = probe: several models are scored here"),
    ],
)
def test_errors(runs: tuple[Path, Path], words: list[str], message: str):
    words = [str(runs[1] / "export" / "40") if word == "STUDENT" else word for word in words]
    json_file = HomePath(words.pop()) if "--json" in words else HomePath("")
    data = [f"gallery={runs[0].parent}", f"query={runs[0].parent}"] if words == ["log_mel"] else []
    with pytest.raises(UserError, match=message):
        compare(str(runs[0] / "export" / "40"), [*(w for w in words if w != "--json"), *data], json=json_file)
