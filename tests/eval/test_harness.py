"""The harness on tasks from local JSON files: our adapter gives the same numbers as the harness's model class for
transformers with the same weights."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from common.errors import UserError
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.train import train
from tests.conftest import tiny_recipe, unlabeled
from tests.data.texts import prose

TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "go_on": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": [" the", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def plain(seed: int, words: int) -> str:
    """Prose without the names of special tokens, because we encode such names as text, and transformers as special
    tokens."""
    return prose(seed, words).replace("<|endoftext|>", "we").replace("<mask>", "sea")


@pytest.fixture(scope="module")
def exports(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A decoder that transformers can open, an encoder, and a model that reads images."""
    out = tmp_path_factory.mktemp("runs")
    options = {"gpt": ["model.mlp=swiglu", "model.qk_norm=false"], "bert": [], "mae": []}
    runs = {name: train(tiny_recipe(name, shards, out / name, "steps=4", *more)) for name, more in options.items()}
    return {name: str(run / "export" / "4") for name, run in runs.items()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "question": plain(n, 3 + n),
            "choices": [plain(100 + n, 2), plain(200 + n, 4), plain(300 + n, 1)],
            "answer": n % 3,
            "text": plain(400 + n, 5 + 6 * n),  # the longest have several rows of 32 tokens
            "written": "",
        }
        for n in range(12)
    ]
    (folder / "documents.json").write_text("\n".join(map(json.dumps, documents)))
    for name, content in TASKS.items():
        data = {"data_files": {"test": str(folder / "documents.json")}, "cache_dir": str(folder / "cache")}
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            **content,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def numbers(model: Any, tasks: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = [f"local_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0)


@pytest.mark.slow
def test_numbers_equal_those_of_the_harness_model_for_transformers(exports: dict[str, str], tasks: Path):
    from lm_eval.models.huggingface import HFLM

    from eval.harness import Model

    ours = numbers(Model(exports["gpt"], batch_size=5, bos=False), tasks)
    theirs = numbers(
        HFLM(exports["gpt"], device="cpu", dtype="float32", batch_size=1, add_bos_token=False, max_length=32), tasks
    )
    checked = 0
    for task, scores in theirs["results"].items():
        for key, value in scores.items():
            if isinstance(value, float):
                assert ours["results"][task][key] == pytest.approx(value, rel=1e-4), (task, key)
                checked += math.isfinite(value)
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for mine, other in zip(_flat(a["resps"]), _flat(b["resps"]), strict=True):
                assert mine == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other), task
    assert checked >= 8
    written = [_flat(sample["resps"])[0] for sample in ours["samples"]["local_write"]]
    assert any(written) and all(" the" not in text and "\n" not in text for text in written)


def _flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.slow
def test_contexts_begin_with_bos(exports: dict[str, str]):
    """Comparison with a sum over single tokens after BOS. Of a long context, the last tokens are used."""
    from lm_eval.api.instance import Instance

    from eval.harness import Model

    model = Model(exports["gpt"], batch_size=2)
    pairs = [(prose(1, 4), " " + prose(2, 3)), (prose(3, 40), " sea"), ("", "ship")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    for (context, continuation), (value, greedy) in zip(pairs, model.loglikelihood(asked), strict=True):
        given, whole = (
            [model.vocabulary.bos, *model.tokens.encode(text, add_special_tokens=False).ids]
            for text in (context, context + continuation)
        )
        total, likeliest = 0.0, True
        for place in range(len(given), len(whole)):
            seen = whole[max(0, len(whole) - 1 - 32) : place]
            with torch.no_grad():
                logits = model.model.head(model.model(torch.tensor([seen])).tokens[0, -1])
            total += float(logits.log_softmax(-1)[whole[place]])
            likeliest &= int(logits.argmax()) == whole[place]
        assert value == pytest.approx(total, rel=1e-5) and greedy == likeliest


@pytest.mark.slow
def test_the_command(exports: dict[str, str], tasks: Path):
    """Scores are printed and added to the results of the run, and the report can still be written."""
    done = unlabeled("harness", exports["gpt"], "local_choose", "local_rolling", "--include", tasks, "--limit", 5)
    assert done.returncode == 0, done.stderr
    assert "local_choose/acc " in done.stdout and "local_rolling/bits_per_byte" in done.stdout
    run = Path(exports["gpt"]).parents[1]
    rows = [row for row in read_rows(run / "results.jsonl") if row["protocol"] == "harness"]
    assert {row["split"] for row in rows} == {"custom"} and {row["count"] for row in rows} == {5}
    assert unlabeled("report", run).returncode == 0


@pytest.mark.slow
def test_errors(exports: dict[str, str], tasks: Path, monkeypatch: pytest.MonkeyPatch):
    from eval import harness

    for name, message in (
        ("mae", "holds a model that reads images"),
        ("bert", "holds a bert_micro, but the harness scores decoders"),
    ):
        with pytest.raises(UserError, match=message):
            harness.evaluate(exports[name], ["local_choose"], str(tasks))
    with pytest.raises(UserError, match=r"'local_chose': no such task; .*local_choose"):
        harness.evaluate(exports["gpt"], ["local_chose"], str(tasks))
    with pytest.raises(UserError, match="--include nowhere: no such folder"):
        harness.evaluate(exports["gpt"], ["local_choose"], "nowhere")
    with pytest.raises(UserError, match="--limit 0: write 1 or more"):
        harness.evaluate(exports["gpt"], ["local_choose"], str(tasks), limit=0)

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr(harness, "simple_evaluate", unreachable)
    with pytest.raises(UserError, match=r"arc_easy: the texts of a task cannot be downloaded .*ai2_arc"):
        harness.evaluate(exports["gpt"], ["arc_easy"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "eval.harness")
    with pytest.raises(UserError, match=r"pip install 'unlabeled\[harness\]'"):
        __import__("eval.harness")
