"""Runs on text: token sets in a recipe, what is refused, what a model will read, and the demo's text with and without a registry."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import demo_text, index
from data_pipeline.rows import Rows
from data_pipeline.storage import DataError
from launch.preview_text import lines, preview
from pretrain.config import ConfigError
from pretrain.errors import UserError
from pretrain.inputs import inputs, open_samples
from pretrain.recipe import Recipe, load
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.data.texts import tokens_of, write_texts

CAUSAL = Path(__file__).with_name("causal.py")
SIZES = ["vocab_size=448", "context=128", "depth=2", "dim=32", "heads=2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "text", 60)


@pytest.fixture(scope="module")
def held(texts: Path) -> Path:
    return tokens_of(texts, texts.parent / "tokens")


def recipe(data: object, run: Path, *overrides: str) -> Recipe:
    own = [f"objective={CAUSAL}", "model=gpt", *(f"model.{size}" for size in SIZES)]
    own += [f"data.train={data}", "data.batch=8", "data.workers=0", "steps=4", f"run={run}", "checkpoint=2"]
    return load(
        "demo",
        [
            *own,
            "export=100",
            "log=1",
            "log.flops=false",
            "threads=1",
            "precision=fp32",
            "eval.image_size=null",
            *overrides,
        ],
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_text_trains_and_goes_on_as_if_it_had_not_stopped(held: Path, tmp_path: Path):
    whole = train(recipe(held, tmp_path / "whole", "data.packing=best_fit"))
    run = train(recipe(held, tmp_path / "run", "data.packing=best_fit", "steps=2", "optim.lr.steps=4"))
    assert losses(run) == losses(whole)[:2] and losses(whole)[-1] < losses(whole)[0]
    assert (run / "tokenizer.json").read_bytes() == (held / "tokenizer.json").read_bytes()
    assert (run / "tokenizer_config.json").read_bytes() == (held / "tokenizer_config.json").read_bytes()
    assert (run / "export" / "2" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match=r"data.length: None → 16"):
        train(recipe(held, run, "data.packing=best_fit", "data.length=16"))
    mixed = recipe([], tmp_path / "mixed", f"data.mix=[{{shards: {held}, weight: 3}}, {{shards: {held}, weight: 1}}]")
    assert len(losses(train(mixed))) == 4


def test_what_views_get_of_the_data(held: Path, tmp_path: Path):
    from pretrain.train import build_objective

    cfg = recipe(held, tmp_path / "run", "data.length=16")
    samples, body = open_samples(cfg), build_objective(cfg).encoder()
    length, vocabulary, document_mask = inputs(cfg, body, samples)
    assert length == 16 and vocabulary.size == 400 and document_mask and isinstance(samples[0], Rows)
    length, vocabulary, _ = inputs(cfg, body)  # before there are data
    assert (length, vocabulary.size, len(vocabulary.sentinels)) == (16, 448, 100)
    cfg = recipe(held, tmp_path / "run", "data.document_mask=false")
    assert inputs(cfg, body, samples)[2] is False


def test_recipes_that_do_not_fit_their_data_are_refused(texts: Path, held: Path, shards: Path, tmp_path: Path):
    other = tokens_of(texts, tmp_path / "other", vocab=300)
    mix = f"data.mix=[{{shards: {held}}}, {{shards: {other}}}]"
    run = tmp_path / "run"
    for cfg, match in [
        (recipe(shards, run), r"holds .jpg, .cls, .json and no tokens; make them with `unlabeled shards tokenize"),
        (recipe(texts, run), r"holds .txt and no tokens"),
        (tiny_recipe("mae", held, run), r"holds tokens, but model.name = vit reads images"),
        (recipe(held, run, "model.vocab_size=128"), r"has 400 tokens; write model.vocab_size=448"),
        (recipe(held, run, "data.length=256"), r"data.length = 256: must be 1 or more and at most model.context = 128"),
        (recipe([], run, mix), rf"different tokenizers; tokenize one again with --tokenizer {held}/tokenizer.json"),
        (recipe(held, run, "objective=mae"), r"objective.name = mae: trains on images, but model.name = gpt"),
        (tiny_recipe(str(CAUSAL), shards, run), r"causal.py: trains on text, but model.name = vit reads images"),
        (recipe(held, run, "data.mean=[0.5]"), r"nothing reads data.mean"),
        (tiny_recipe("mae", shards, run, "data.length=16"), r"nothing reads data.length"),
    ]:
        with pytest.raises((ConfigError, DataError), match=match):
            train(cfg)


def test_a_preview_shows_documents_and_what_is_not_predicted(held: Path, tmp_path: Path):
    out = "\n".join(preview(recipe(held, tmp_path / "run", "data.packing=best_fit"), 30))
    assert out.count("row ") == 30 and "‹" in out and "document 1, " in out
    out = "\n".join(preview(tiny_recipe("gpt", held, tmp_path / "gpt"), 8))
    assert out.count("‹") >= 8 and "⟦" not in out
    out = "\n".join(preview(tiny_recipe("bert", held, tmp_path / "bert"), 8))
    shown = re.findall(r"⟦(.+?)→(.+?)⟧", out)
    assert 20 <= len(shown) <= 40  # 15 % of 8 rows of 32
    assert sum(seen == "<|mask|>" for seen, _ in shown) == out.count("<|mask|>") > len(shown) / 2
    words = np.array(["<s>", "the", "sea", "of", "[M]", "wind"])

    def decode(ids: np.ndarray) -> str:
        return " ".join(words[ids])

    documents = np.array([0, 0, 0, 1, 1, -1])
    sample = {"tokens": np.array([0, 1, 4, 0, 2, 0]), "documents": documents}
    assert list(lines(sample, decode)) == [
        "  document 0, 3 tokens: '‹<s>›the [M]'",
        "  document 1, 2 tokens: '‹<s>›sea'",
        "  1 tokens of padding",
    ]
    masked = sample | {"targets": np.array([-100, -100, 5, -100, -100, -100])}
    assert next(lines(masked, decode)) == "  document 0, 3 tokens: '<s> the⟦[M]→wind⟧'"
    placed = sample | {"places": np.array([2, 4, 0]), "targets": np.array([5, 3, -100])}
    assert list(lines(placed, decode))[:2] == [
        "  document 0, 3 tokens: '<s> the⟦[M]→wind⟧'",
        "  document 1, 2 tokens: '<s>⟦sea→of⟧'",
    ]
    follow = sample | {"targets": np.array([1, 4, -100, 2, -100, -100])}
    assert list(lines(follow, decode)) == list(lines(sample, decode))
    spans = {"tokens": np.array([1, 4]), "decoder_tokens": np.array([0, 4]), "targets": np.array([4, 2])}
    assert list(lines(spans, decode))[-1] == "  asked for, 2 tokens: '[M] sea'"


def test_the_demo_text_without_a_registry_is_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    modules = tmp_path / "lib"  # a small one
    (modules / "json").mkdir(parents=True)
    for source in (Path(os.__file__).parent / "json").glob("*.py"):
        (modules / "json" / source.name).write_text(source.read_text())
    for n in range(20):
        (modules / f"m{n}.py").write_text(f"'''Module {n}'''\n" + "x = 1\n" * 80)
    monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda name: str(modules))
    said: list[str] = []
    target = tmp_path / "demo"
    assert demo_text.make(target, "auto", 300, 1, said.append) == "stdlib"
    assert "taking the standard library instead" in "\n".join(said)
    counts = [index.load(str(target / split)).about["tokens"]["documents"] for split in demo_text.SPLITS]
    assert (
        sum(counts) == json.loads((target / "text" / "set.json").read_text())["counts"]["train"] + counts[1] + counts[2]
    )
    assert len(Rows([str(target / "train")], 64)) > 10
    assert demo_text.make(target, "auto", 300, 1, said.append) == "stdlib"  # nothing is done
    with pytest.raises(DataError, match='holds "stdlib", not "speeches"'):
        demo_text.make(target, "speeches", 300, 1, said.append)
    with pytest.raises(DataError, match="cannot be downloaded"):
        demo_text.make(tmp_path / "other", "speeches", 300, 1, said.append)
