"""An evaluation that cannot give scores is refused at the start; a scoring process that dies is started again; a run
that lacks scores at the end does not look like a success."""

from __future__ import annotations

import contextlib
import errno
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from common import config
from common.errors import UserError
from data_pipeline.build.build_shards import build
from eval import results
from eval.periodic_scoring import MAX_RESTARTS, check
from eval.tiers import tasks
from launch import watch
from launch.due_evaluations import due, lacks
from pretrain.recipes.recipe import load
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.signals import EXIT_UNSCORED
from pretrain.train import train
from tests.conftest import tiny_recipe, tokens
from tests.data.texts import tokens_of, write_texts
from tests.tars import jpeg, write_tar

QUICK = ("steps=2", "eval.quick=[knn]", "eval.final=[knn]", "eval.pixels=false")


def scored(shards: Path, run: Path, *overrides: str):
    return tiny_recipe("mae", shards, run, *QUICK, f"eval.gallery={shards}", f"eval.test={shards}", *overrides)


def test_what_cannot_be_scored_is_refused_before_anything_is_written(photos: Path, shards: Path, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    write_tar(tmp_path / "bare" / "a.tar", [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    shutil.copytree(photos / "china", tmp_path / "one" / "china")
    build(tmp_path / "one", tmp_path / "china")
    for override, message in (
        (f"eval.test={tmp_path / 'none'}", "eval.test: .*none: no such file or folder"),
        (f"eval.gallery={tmp_path / 'bare'}", r"eval.gallery: .*a.tar: 0 has no .cls member"),
        (
            f"eval.gallery={tmp_path / 'china'}",
            "eval.gallery: .*all of its labels are 'china', but 2 classes are needed",
        ),
        ("eval.gallery=[]", "eval.gallery: is empty"),
        ("eval.final=[knm]", "eval.final: .*did you mean knn"),
        ("eval.final=[bits_per_byte]", "eval.test: bits_per_byte scores language models"),
        (
            "eval.final=[segmentation]",
            r"eval.gallery: .*holds .jpg, .cls, .json, and no map for segmentation; put NAME.mask.png",
        ),
        ("eval.final=[depth]", r"eval.gallery: .*no map for depth; put NAME.depth.png beside NAME.jpg"),
        ("eval.final=[group]", "eval.gallery: group.field is empty; write a field of the .json members"),
        ("eval.final=[retrieval]", "eval.final: names a protocol that compares images with texts, but mae trains no"),
        (f"eval.final.query=[{tmp_path / 'none'}]", "eval.final.query: .*none: no such file or folder"),
        ("eval.final.options=[knn.kk=5]", "eval.final: eval.final.options: knn.kk = 5: no such key; did you mean k"),
        ("eval.final.options=[knn.k=0]", "eval.final: eval.final.options: knn.k = 0: must be 1 or more"),
        (
            "eval.final={protocols: [logistic], options: [logistic.save=probe]}",
            "eval.final: logistic.save = probe: several",
        ),
        ("eval.final.options=[linear.steps=5]", "eval.final: .*'linear.steps=5': the tier has no protocol linear"),
        ("eval.final.options=[k=5]", "eval.final: .*'k=5' is no option of a protocol; write PROTOCOL.OPTION=VALUE"),
    ):
        with pytest.raises(
            UserError, match=rf"^{message}.*; write eval.val=\[\] eval.test=\[\] to train without scores$"
        ):
            train(scored(shards, tmp_path / "run", override))
    with pytest.raises(UserError, match=r"eval.full names linear, but no shards; write eval.val=SHARDS"):
        train(scored(shards, tmp_path / "run", "eval.full=[linear]"))
    assert not (tmp_path / "run").exists()


def test_which_exports_are_scored_by_which_tier(tmp_path: Path):
    """The three tiers of a run of 30 steps, and that rows that are in results.jsonl are not computed again."""
    words = ["eval.gallery=[a]", "eval.val=[b]", "eval.test=[c]", "eval.device=cuda:1", "steps=30", "export=10"]
    full = ["eval.full.protocols=[linear,segmentation]", "eval.full.every=20", "eval.full.query=[d]"]
    full += ["eval.full.options=[linear.steps=5,'linear.rates=[1]']", "eval.full.device=cuda:2"]
    cfg = load("demo", [*words, *full, f"run={tmp_path}", "eval.periodic=[knn,fewshot]"])  # the former name of quick
    assert cfg.eval.quick.protocols == ["knn", "fewshot"] and "periodic" not in config.to_dict(cfg)["eval"]
    found = tasks(cfg)
    assert [(t.tier, t.gallery, t.query, t.device) for t in found.values()] == [
        ("eval.quick", ["a"], ["b"], ""),
        ("eval.full", ["a"], ["d"], "cuda:2"),
        ("eval.final", ["a"], ["c"], ""),
    ]
    assert (
        found["full"].option_values() == {"linear": {"steps": 5, "rates": [1]}}
        and found["full"].query_key == "eval.full.query"
    )
    for step in (0, 10, 20, 30):
        (tmp_path / "export" / str(step)).mkdir(parents=True)
        (tmp_path / "export" / str(step) / "config.json").write_text("{}")
    every = [
        (step, split) for step in (0, 10, 20, 30) for split in ("val", "test") if split == "val" or step in (0, 30)
    ]
    expected = [(0, "test"), *every, (0, "full"), (20, "full"), (30, "full")]
    assert [(step, split) for _, step, split in due(tmp_path, cfg)] == expected
    rows = [
        ("untrained", 0, "val", "knn"),
        ("untrained", 0, "full", "linear"),
        ("untrained", 0, "full", "segmentation"),
    ]
    keys, score = ("model", "step", "split", "protocol"), {"metric": "accuracy", "value": 0.5}
    results.append(tmp_path / "results.jsonl", [dict(zip(keys, row, strict=True)) | score for row in rows])
    left = due(tmp_path, cfg)
    assert [(step, split) for _, step, split in left] == [one for one in expected if one != (0, "full")]
    assert lacks(left[1], found["val"], cfg, results.scored(tmp_path / "results.jsonl")) == ["fewshot"]
    with pytest.raises(
        UserError, match=r"eval.quick.every = 15: .*every 10 steps \(export.every\).*eval.quick.every=20"
    ):
        load("demo", [*words, "eval.quick.every=15"])
    with pytest.raises(UserError, match=r"eval.periodic is the former name of eval.quick; remove it"):
        path = tmp_path / "both.yaml"
        path.write_text("extends: demo\neval: {periodic: [knn], quick: [knn]}\n")
        load(path)


def test_tokens_of_another_tokenizer_are_refused(shards: Path, tmp_path: Path):
    held, other = tokens(shards.parent), tmp_path / "other"
    tokens_of(write_texts(tmp_path / "texts"), other, vocab=400, specials=("sentinels",))
    names = ["eval.quick=[bits_per_byte]", "eval.final=[bits_per_byte]"]
    check(tiny_recipe("gpt", shards, tmp_path / "run", *names, f"eval.val={held}"))
    with pytest.raises(UserError, match=r"eval.val: .*other: was made with another tokenizer than"):
        check(tiny_recipe("gpt", shards, tmp_path / "run", *names, f"eval.val={other}"))
    with pytest.raises(UserError, match=r"eval.health = 20: measures models of images, but this one reads tokens"):
        check(tiny_recipe("gpt", shards, tmp_path / "run", *names, f"eval.val={held}", "eval.health=20"))


@pytest.mark.slow
def test_train_scores_as_the_command_does(shards: Path, tmp_path: Path):
    cache = tmp_path / "features"
    options = ("export=1", f"eval.val={shards}", f"eval.cache={cache}", "eval.health=20", "eval.full.every=2")
    options += ("eval.full.protocols=[linear]", "eval.full.options=[linear.steps=5,linear.batch=16]")
    run = train(scored(shards, tmp_path / "run", *options))
    rows = read_rows(run / "results.jsonl")
    assert {(row["model"], row["step"], row["protocol"], row["split"]) for row in rows} == {
        ("untrained", 0, "knn", "val"),
        ("untrained", 0, "knn", "test"),
        ("pretrained", 1, "knn", "val"),
        ("pretrained", 2, "knn", "val"),
        ("pretrained", 2, "knn", "test"),
        ("untrained", 0, "linear", "full"),
        ("pretrained", 2, "linear", "full"),
        *((model, step, "health", "train") for model, step in (("untrained", 0), ("pretrained", 1), ("pretrained", 2))),
    }
    assert {row["count"] for row in rows if row["metric"] == "rankme"} == {20}
    assert len(list(cache.iterdir())) == 4  # of the first and the last export; for linear with those of further blocks
    (run / "results.jsonl").unlink()
    shutil.copytree(shards, tmp_path / "shards")
    cfg = scored(shards, run, f"eval.test={tmp_path / 'shards'}")
    for tar in (tmp_path / "shards").glob("*.tar"):  # its index is whole, its bytes are not
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(UserError, match=r"eval.test: .*none of its labels can be read"):
        train(cfg)


def kill_scoring(process: subprocess.Popen, enough: Callable[[int], bool]) -> int:
    """Kill each scoring process as soon as it exists; counts them."""
    killed: set[int] = set()
    while process.poll() is None and not enough(len(killed)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "launch.watch" in child.cmdline() and child.pid not in killed:
                    # it gives way to the training, also if memory is short
                    assert child.nice() >= 10 and Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "500\n"
                    child.kill()
                    killed.add(child.pid)
        time.sleep(0.01)
    return len(killed)


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_a_scoring_process_that_dies(always: bool, shards: Path, tmp_path: Path):
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(config.dump(scored(shards, run)))
    command = [sys.executable, "-m", "launch.cli", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = kill_scoring(process, lambda count: count == 1 and not always)
    _, error = process.communicate(timeout=300)
    assert killed == (MAX_RESTARTS + 1 if always else 1) and "Traceback" not in error
    assert "the scoring process was killed by SIGKILL; it is started again" in error
    exported = run / "export" / "2" / "model.safetensors"
    if always:
        assert process.returncode == EXIT_UNSCORED not in (0, 1, 2, 75)
        assert f"error: {run}: trained, but the scoring process died 4 times; the same command tries again" in error
    else:
        assert process.returncode == 0 and len(read_rows(run / "results.jsonl")) > 1
        plain = train(tiny_recipe("mae", shards, tmp_path / "plain", "steps=2"))  # nothing is scored
        assert exported.read_bytes() == (plain / "export" / "2" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_evaluation_that_fails_ends_with_a_code_of_its_own(shards: Path, tmp_path: Path):
    run = train(tiny_recipe("mae", shards, tmp_path / "run", *QUICK, f"eval.gallery={shards}"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("test: []", f"test: [{tmp_path / 'gone'}]", 1))
    done = subprocess.run(
        [sys.executable, "-m", "launch.watch", str(run)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == EXIT_UNSCORED and done.stderr.count("evaluation of") == 4  # two exports, each tried again
    assert "gone: no such file or folder" in (run / "log.txt").read_text()


def test_scores_are_complete_after_a_disk_was_full(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """While TensorBoard's file cannot be written, and log.txt neither, rows and scalars are kept."""
    run = train(tiny_recipe("mae", shards, tmp_path / "run", *QUICK, f"eval.gallery={shards}"))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("test: []", f"test: [{shards}]", 1))
    (run / "log.txt").rename(run / "log.before")
    (run / "log.txt").symlink_to("/dev/full")
    write, failures = RecordWriter.write, iter([True] * 2)

    def sometimes(self: RecordWriter, data: bytes) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", sometimes)
    monkeypatch.setattr(watch.child_signals, "input_closed", lambda wait: True)
    monkeypatch.setattr(results, "append_new", once_refused(results.append_new, run / "log.txt"))
    assert watch.watch(run) == 0
    assert {row["step"] for row in read_rows(run / "results.jsonl") if row["protocol"] == "knn"} == {0, 2}
    files = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step for event in files.Scalars("test/knn/accuracy")} == {0, 2}
    assert "evaluation of" in (run / "log.txt").read_text()


def once_refused(append: Callable, log: Path) -> Callable:
    """A function whose first call fails as on a full disk; at the second call, the disk has room for `log`, too."""
    calls = itertools.count()

    def refused(*arguments: Any) -> bool:
        if next(calls) == 0:
            raise UserError("scores cannot be written (the disk is full)")
        if log.is_symlink():
            log.unlink()
            watch._log(log.parent, "there is room again")
        return append(*arguments)

    return refused
