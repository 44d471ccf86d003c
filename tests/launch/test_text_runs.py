"""Runs on text: token sets in a recipe, errors, previews of the model's input, and the demo text with and without a
package registry."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError, UserError
from common.progress import Progress
from data_pipeline.build import demo_text
from data_pipeline.parts.part import About
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.token_blocks import Blocks
from data_pipeline.shards.token_rows import Rows
from data_pipeline.stream.stream import Stream, default_workers
from launch import local
from launch.preview_text import lines, preview
from pretrain.build import about, build_objective, open_samples
from pretrain.interchange import weights
from pretrain.objectives.gpt import GPT
from pretrain.parallel.device import threads
from pretrain.recipes.recipe import Recipe, load
from pretrain.train import train
from pretrain.validation import held_out_batches
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


@pytest.mark.slow
def test_a_run_on_text_trains_and_goes_on_as_if_it_had_not_stopped(held: Path, tmp_path: Path):
    whole = train(recipe(held, tmp_path / "whole", "data.packing=best_fit"))
    run = train(recipe(held, tmp_path / "run", "data.packing=best_fit", "steps=2", "optim.lr.steps=4"))
    assert losses(run) == losses(whole)[:2] and losses(whole)[-1] < losses(whole)[0]
    said = f"{run}: trained on 16 rows in the steps from 0 to 2; 0 were damaged and replaced by neighbours"
    assert said in (run / "log.txt").read_text()
    assert (run / "tokenizer.json").read_bytes() == (held / "tokenizer.json").read_bytes()
    assert (run / "tokenizer_config.json").read_bytes() == (held / "tokenizer_config.json").read_bytes()
    assert (run / "export" / "2" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match=r"data.length: None → 16"):
        train(recipe(held, run, "data.packing=best_fit", "data.length=16"))
    mixed = recipe([], tmp_path / "mixed", f"data.mix=[{{shards: {held}, weight: 3}}, {{shards: {held}, weight: 1}}]")
    assert len(losses(train(mixed))) == 4


@pytest.mark.slow
def test_a_run_takes_the_loss_on_held_out_text_and_counts_tokens(
    texts: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the same rows each time, every `log.val_every` steps and after the last one; it does not change the
    training."""
    plain = train(recipe(held, tmp_path / "plain", "objective=gpt", "steps=6"))
    own = [
        "objective=gpt",
        "steps=6",
        f"eval.val={held}",
        "eval.quick=[]",
        "log.val_every=4",
        "log.val_batches=2",
        "log.every=2",
    ]
    shown: list[str] = []
    monkeypatch.setattr(Progress, "update", lambda self, done, text, **_: shown.append(text))
    run = train(recipe(held, tmp_path / "run", *own))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses(run) == losses(plain)
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 5]
    assert rows[-1]["tokens"] == 6 * 8 * 128 and rows[-1]["tokens_per_second"] > 0
    assert rows[5]["val_loss"] < rows[3]["val_loss"]
    assert re.match(r"loss [\d.]+ val [\d.]+  [\d.]+k? tokens/s  6\.14k tokens", shown[-1]), shown
    board = b"".join(path.read_bytes() for path in (run / "tensorboard").glob("events*"))
    assert b"val/loss" in board and b"train/tokens_per_second" in board and b"train/val_loss" not in board
    model = weights.load_backbone(run / "export" / "6")[0]  # by the exported weights, on the same rows
    stream = Stream([Rows([str(held)], 128)], GPT.views(None, About(length=128, document_mask=True)), 8, 0, workers=0)
    total = count = 0.0
    for batch in (next(stream), next(stream)):
        with torch.no_grad():
            hidden = model(batch["tokens"], documents=batch["documents"]).tokens
            total += float(model.head(hidden, batch["targets"]))
            count += int((batch["targets"] >= 0).sum())
    assert rows[5]["val_loss"] == pytest.approx(total / count, rel=1e-5)
    other = tokens_of(texts, tmp_path / "other", vocab=300)
    for val, said in ((other, "were made with different tokenizers"), (texts, "holds .txt and no tokens")):
        lines: list[str] = []
        cfg = recipe(held, tmp_path / "run", "objective=gpt", f"eval.val={val}")
        engine = SimpleNamespace(world=1, accumulate=1)
        assert held_out_batches(cfg, build_objective(cfg), open_samples(cfg), engine, lines.append) == []  # type: ignore[arg-type]
        assert said in lines[0]
    text = (run / "recipe.yaml").read_text()
    assert not re.search(r"^  (color|mean|std|image_size):", text, re.MULTILINE) and load(run).data.mean
    card = (run / "export" / "6" / "README.md").read_text()
    assert f"- 60 documents, {Blocks([str(held)]).tokens.sum():,} tokens, " in card
    assert "6 steps of 8 rows of 128 tokens, 6,144 tokens in all, fp32." in card


def test_gpt_demo_with_data_of_ones_own_needs_no_demo_text(held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_text, "make", lambda *_: pytest.fail("the demo text was asked for"))
    said: list[str] = []
    monkeypatch.setattr(local, "say", said.append)
    cfg = load("gpt_demo", [f"data.train={held}"])
    local.provide(cfg)
    assert cfg.eval.val == cfg.eval.test == []
    assert "no scores on eval.val and eval.test" in said[0] and f"--tokenizer {held}/tokenizer.json" in said[0]
    cfg = load("gpt_demo", [f"data.train={held}", f"eval.val={held}", "eval.test=[]"])
    local.provide(cfg)
    assert cfg.eval.val == [str(held)] and len(said) == 1


def test_threads_follow_the_environment_and_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 6, 7})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads(), threads(2), threads(9), default_workers(1)) == (6, 3, 1, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert threads(2) == 3


def test_a_run_of_before_open_schedules_goes_on(held: Path, tmp_path: Path):
    short = ["objective=gpt", "optim.lr={kind: linear, value: 0.001, steps: 4}"]
    run = train(recipe(held, tmp_path / "run", *short, "steps=2"))
    stored = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(stored.replace("    open: false\n", ""))
    assert "open: false" in stored
    cfg = recipe(held, run, "objective=gpt", "optim.lr={kind: linear, value: 0.001, steps: 4, open: true}", "steps=2")
    train(cfg)
    assert cfg.optim.lr.open is False


def test_what_views_get_of_the_data(held: Path, tmp_path: Path):
    cfg = recipe(held, tmp_path / "run", "data.length=16")
    samples, objective = open_samples(cfg), build_objective(cfg)
    known = about(cfg, objective, samples)
    assert known.length == 16 and known.vocabulary.size == 400 and known.document_mask and isinstance(samples[0], Rows)
    known = about(cfg, objective)  # before there are data
    assert (known.length, known.vocabulary.size, len(known.vocabulary.sentinels)) == (16, 448, 100)
    cfg = recipe(held, tmp_path / "run", "data.document_mask=false")
    assert about(cfg, build_objective(cfg), samples).document_mask is False


@pytest.mark.slow
def test_recipes_that_do_not_fit_their_data_are_refused(texts: Path, held: Path, shards: Path, tmp_path: Path):
    other = tokens_of(texts, tmp_path / "other", vocab=300)
    mix = f"data.mix=[{{shards: {held}}}, {{shards: {other}}}]"
    run = tmp_path / "run"
    for cfg, match in [
        (recipe(shards, run), r"holds .jpg, .cls, .json and no tokens; make them with `unlabeled shards tokenize"),
        (recipe(texts, run), r"holds .txt and no tokens"),
        (tiny_recipe("mae", held, run), r"holds .docs, .tokens and no image; members are read whose names end in jpg"),
        (recipe(held, run, "model.vocab_size=128"), r"has 400 tokens; write model.vocab_size=448"),
        (
            recipe(held, run, "data.length=256"),
            r"data.length = 256: must be at least 1 and at most model.context = 128",
        ),
        (
            recipe([], run, mix),
            rf"different tokenizers; tokenize the text .* again with --tokenizer {held}/tokenizer.json",
        ),
        (recipe(held, run, "objective=mae"), r"objective.name = mae: trains on image, but model.name = gpt"),
        (tiny_recipe(str(CAUSAL), shards, run), r"causal.py: trains on tokens, but model.name = vit reads image"),
        (recipe(held, run, "data.mean=[0.5]"), r"nothing reads data.mean"),
        (tiny_recipe("mae", shards, run, "data.length=16"), r"nothing reads data.length"),
    ]:
        cfg.run = str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")  # one may fail after its first step
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
    assert list(lines(spans, decode))[-1] == "  targets, 2 tokens: '[M] sea'"


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
    assert "using the standard library instead" in "\n".join(said)
    counts = [load_manifest(str(target / split)).details["tokens"]["documents"] for split in demo_text.SPLITS]
    assert (
        sum(counts) == json.loads((target / "text" / "set.json").read_text())["counts"]["train"] + counts[1] + counts[2]
    )
    assert len(Rows([str(target / "train")], 64)) > 10
    assert demo_text.make(target, "auto", 300, 1, said.append) == "stdlib"  # nothing is done
    with pytest.raises(DataError, match='holds "stdlib", not "speeches"'):
        demo_text.make(target, "speeches", 300, 1, said.append)
    with pytest.raises(DataError, match="cannot be downloaded"):
        demo_text.make(tmp_path / "other", "speeches", 300, 1, said.append)
