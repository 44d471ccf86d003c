"""Features of labelled texts from frozen encoders: their pooling, and scores compared with an untrained encoder and
bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.errors import DataError, UserError
from data_pipeline.build.build_shards import build
from data_pipeline.shards.samples import Samples
from eval.features import open_encoder
from eval.run import evaluate
from eval.text_features import bytes_of, label_of, text_of
from launch import watch
from pretrain.metrics import Board
from pretrain.parallel.device import scoring_device
from pretrain.recipes.evaluation import FinalTier
from pretrain.recipes.recipe import stored
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import tiny_recipe, unlabeled
from tests.tars import write_tar


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real text in two classes: code of the standard library, and prose from its licences and docstrings."""
    import asyncio
    import pydoc_data.topics

    folder = tmp_path_factory.mktemp("labelled")
    code = "\n".join(path.read_text() for path in sorted(Path(asyncio.__file__).parent.glob("*.py")))
    prose = "\n".join(pydoc_data.topics.topics.values())
    rows = [
        {"text": t[2000 * n :][:300], "label": name}
        for n in range(150)
        for name, t in (("code", code), ("prose", prose))
    ]
    for split, part in (("train", rows[:200]), ("test", rows[200:])):
        (folder / split).mkdir()
        (folder / split / "rows.jsonl").write_text("\n".join(map(json.dumps, part)))
        build(folder / split, folder / f"{split}-shards")
    return {split: folder / f"{split}-shards" for split in ("train", "test")}


@pytest.fixture(scope="module")
def exports(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("runs")
    runs = {n: train(tiny_recipe(n, shards, out / n, "steps=4")) for n in ("gpt", "bert", "t5", "mae")}
    return {name: str(run / "export" / "4") for name, run in runs.items()}


@pytest.mark.parametrize("name", ["gpt", "mae"])
def test_scoring_during_training_does_not_use_the_gpu(
    name: str, exports: dict[str, str], labelled: dict[str, Path], shards: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a machine whose GPUs the trainer uses, features are computed on the CPU, or on `eval.device`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    export = Path(exports[name])
    run = export.parents[1]
    sets = labelled if name == "gpt" else {"train": shards, "test": shards}
    options = {"gallery": [str(sets["train"])], "test": [str(sets["test"])], "final": FinalTier(["knn"])}
    recipe = stored(run)
    for key, value in options.items():
        setattr(recipe.eval, key, value)
    recipe.device = "auto"
    watch.score(run, recipe, str(export), 4, "test", Board(run / "tensorboard"), "cpu")
    assert read_rows(run / "results.jsonl")[-1]["protocol"] == "knn"
    assert [scoring_device(asked, trainer) for asked, trainer in (("auto", "cpu"), ("cuda:7", "cuda"))] == [
        "auto",
        "cuda:7",
    ]
    encoder, _ = open_encoder(str(export), device="meta")
    assert encoder.device.type == "meta" and all(p.is_meta for p in encoder.backbone.parameters())


@pytest.mark.parametrize("name", ["gpt", "bert", "t5"])
def test_the_feature_of_a_text_is_the_mean_of_its_tokens(name: str, exports: dict[str, str], labelled: dict[str, Path]):
    """Each text alone, between BOS and EOS, truncated to 32 tokens, in the order of the shards."""
    encoder, _ = open_encoder(exports[name])
    found = encoder.labelled([str(labelled["test"])])
    samples = Samples([str(labelled["test"])])
    texts = [text_of(samples, n) for n in range(len(samples))]
    labels = [label_of(samples, n) for n in range(len(samples))]
    assert found.names == ["code", "prose"] and (found.left_out, found.passed_over, len(texts)) == (0, 0, 100)
    assert [found.names[c] for c in found.classes] == labels
    tokenizer, vocabulary = encoder.vocabulary.tokenizer(), encoder.vocabulary
    texts.append("ship")
    mine = encoder.pooled([*texts[:5], "ship", ""])
    for row, text in zip(mine, [*texts[:5], "ship", ""], strict=True):
        ids = [vocabulary.bos, *tokenizer.encode(text, add_special_tokens=False).ids, vocabulary.eos][:32]
        with torch.no_grad():
            alone = encoder.backbone(torch.tensor([ids])).tokens.mean(1)[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[:5], found.features[:5], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scores_of_text(exports: dict[str, str], labelled: dict[str, Path]):
    """Byte frequencies, and features of encoders that were trained for a few steps, distinguish code and prose."""
    assert bytes_of("aab").sum() == 1 and bytes_of("aab")[97] == pytest.approx(2 / 3) and not bytes_of("").any()
    for model in ("bytes", exports["bert"], exports["t5"]):
        rows = evaluate(model, ["linear", "knn"], [str(labelled["train"])], [str(labelled["test"])])
        value = {(row["protocol"], row["metric"]): row for row in rows}
        assert value["linear", "accuracy"]["value"] > 0.65, model
        assert value["knn", "accuracy"]["unit"] == "texts" and value["knn", "accuracy"]["gallery_count"] == 200
        assert value["knn", "accuracy"]["count"] == 100


@pytest.mark.slow
def test_a_run_scores_its_encoder(shards: Path, labelled: dict[str, Path], tmp_path: Path):
    """During training, with bytes and the untrained encoder as baselines; the scores are in the report and on the model
    card."""
    data = [f"eval.gallery={labelled['train']}", f"eval.val={labelled['test']}", f"eval.test={labelled['test']}"]
    recipe = tiny_recipe("bert", shards, tmp_path / "run", "steps=4", "eval.quick=[knn]", "eval.final=[linear]", *data)
    from pretrain.run_folder.prepare import prepare

    prepare(recipe)
    done = unlabeled("train", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "run" / "results.jsonl")
    test = {row["model"] for row in rows if (row["split"], row["protocol"]) == ("test", "linear")}
    assert test == {"bytes", "untrained", "pretrained"}
    assert {row["step"] for row in rows if (row["split"], row["protocol"]) == ("val", "knn")} == {0, 4}
    done = unlabeled("report", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Test accuracy on 100 texts with a gallery of 200 labelled texts" in page and "images" not in page
    assert "| linear |" in (tmp_path / "run" / "export" / "4" / "README.md").read_text()


def test_errors(exports: dict[str, str], labelled: dict[str, Path], shards: Path, tmp_path: Path):
    text = [str(labelled["train"])], [str(labelled["test"])]
    with pytest.raises(DataError, match="no labelled text shards are named"):
        evaluate(exports["bert"], ["linear"], [], [])
    with pytest.raises(DataError, match=r"no \.txt; make text shards"):
        evaluate(exports["bert"], ["linear"], [str(shards)], [str(shards)])
    with pytest.raises(UserError, match="bits per byte are defined for a decoder"):
        evaluate("bytes", ["bits_per_byte"], *text)
    with pytest.raises(UserError, match=r"reads images, which bits_per_byte does not score; choose .*knn or linear"):
        evaluate(exports["mae"], ["bits_per_byte"], *text)
    (tmp_path / "bare").mkdir()
    write_tar(tmp_path / "bare" / "0.tar", [("a.txt", b"no label")])
    with pytest.raises(DataError, match=r"has no \.cls member"):
        evaluate("bytes", ["linear"], [str(tmp_path / "bare")], [str(tmp_path / "bare")])
    (tmp_path / "bad").mkdir()
    write_tar(
        tmp_path / "bad" / "0.tar",
        [("a.txt", b"\xff\xfe"), ("a.cls", b"0"), ("b.txt", b"fine"), ("b.cls", b"1"), ("c.cls", b"0")],
    )
    found = open_encoder("bytes")[0].labelled([str(tmp_path / "bad")])
    assert (found.names, len(found), found.left_out, found.passed_over) == (["1"], 1, 1, 1)
