"""A user's objective, anywhere on disk, has the same rights as those of the project: check, train, kill, resume,
export and score, without any other edit."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from common import config
from common.errors import UserError
from common.explain import explanations
from pretrain import contract
from pretrain.contract import VIT
from pretrain.objectives import finder
from pretrain.recipes.recipe import load
from pretrain.train import train
from tests.conftest import sampled, unlabeled
from tests.contract.own_objectives import OWN
from tests.faults import killer
from tests.faults.test_processes import environments, wait
from tests.forked import Forked
from tests.tars import write_tar

MODES = {"single": 1, "ddp": 2, "fsdp2": 2}
CASES = [(name, mode) for name in OWN for mode in MODES]
SHOWN = (("queue", "ddp"), ("towers", "fsdp2"), ("labels", "single"))  # each objective and each mode once


@pytest.fixture(scope="module")
def pairs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with labels and with captions that name their classes."""
    from data_pipeline.shards.samples import Samples

    folder, samples, members = tmp_path_factory.mktemp("pairs"), Samples([str(shards)]), []
    for number in range(len(samples)):
        held = samples.read(number)
        label = samples.label(number)
        members += [(f"{number:03d}.jpg", held["jpg"]), (f"{number:03d}.txt", f"a photograph of {label}".encode())]
        members += [(f"{number:03d}.cls", held["cls"])]
    write_tar(folder / "a.tar", members)
    return folder


def recipe_file(folder: Path, name: str, mode: str, data: Path, run: str) -> Path:
    """A recipe beside the objective's file, as its user would write it."""
    (folder / f"{name}.py").write_text(OWN[name])
    path = folder / f"{run}.yaml"
    own: dict = {
        "extends": "demo",
        "objective": f"{name}.py",
        "run": str(folder / run),
        "steps": 8,
        "precision": "fp32",
    }
    own |= {"data": {"train": str(data), "batch": 16, "workers": 0}, "parallel": {"mode": mode}, "threads": 1}
    own |= {"checkpoint": {"every": 3}, "export": {"every": 8}, "log": {"every": 1, "flops": False}}
    own |= {"optim": {"lr": 1e-3}, "eval": {"gallery": [], "val": [], "test": [], "image_size": None}}
    for key, _, value in (word.partition("=") for word in VIT):
        section = own.setdefault("model", {})
        section[key.removeprefix("model.") if "." in key else "name"] = int(value) if value.isdecimal() else value
    path.write_text(config.dump(own))
    return path


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def started(path: Path, count: int, **env: str) -> list[Forked]:
    return [
        Forked(killer.run, [str(path)], env={**env, **e}, output=(os.devnull, f"{path}.errors"), cwd=path.parent)
        for e in (environments(count) if count > 1 else [{}])
    ]


DERIVED = """
from dataclasses import dataclass

from common.config import option
from pretrain.objectives.simclr import Config as Published, SimCLR


@dataclass
class Config(Published):
    crop_scale: float = 0.5
    margin: float = option(0.1, low=0)  # of the negatives


class Margin(SimCLR):
    pass
"""


def test_its_options_may_be_those_of_an_objective_of_the_project(tmp_path: Path):
    """Also if both files have the same name. `config_class` does not import torch for it."""
    path = tmp_path / "simclr.py"
    path.write_text(DERIVED)
    published = load("demo", ["objective=simclr"]).objective
    cfg = load("demo", [f"objective={path}", "objective.temperature=0.3"]).objective
    assert (cfg.temperature, cfg.crop_scale, cfg.margin) == (0.3, 0.5, 0.1)
    assert isinstance(cfg, finder.config_class("simclr")[0]) and pickle.loads(pickle.dumps(cfg)).margin == 0.1
    assert explanations(type(cfg))["margin"] == "of the negatives"
    assert explanations(type(cfg))["temperature"] == explanations(type(published))["temperature"] != ""
    path.write_text("from pretrain.objectives.simclr import Config, SimCLR\n\n\nclass Same(SimCLR):\n    pass\n")
    assert type(load("demo", [f"objective={path}"]).objective) is type(published)


@pytest.mark.parametrize("name", sampled(OWN, "labels", others=pytest.mark.slow))
def test_it_is_checked_by_the_command(name: str, tmp_path: Path):
    (tmp_path / f"{name}.py").write_text(OWN[name])
    done = unlabeled("check", f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith(f"{name}.py: all checks passed\n"), done.stdout + done.stderr


BROKEN = {  # what is changed in a file of OWN -> the check that finds it
    "purpose": (
        "labels",
        '"""Labels: a linear layer',
        '"""Mine. No paper.\\n',
        "its docstring begins with 'Mine. No paper.'",
    ),
    "method": ("labels", "    @staticmethod\n", "", "views: write @staticmethod before it"),
    "drawn": (
        "labels",
        'np.int64(sample["label"])',
        "np.random.randint(0, 2)",
        "views: 'label' differs for the same sample",
    ),
    "noise": (
        "labels",
        "return F.cross_entropy(logits,",
        "return F.cross_entropy(logits + logits.new_tensor(np.random.rand()) * logits,",
        "make random numbers in `views`",
    ),
    "vector": (
        "labels",
        '"accuracy": right}',
        '"accuracy": logits}',
        "logs['accuracy'] is of shape [16, 2] with gradients",
    ),
    "unused": (
        "labels",
        "        self.head = nn.Linear",
        "        self.more = nn.Linear(3, 3)\n        self.head = nn.Linear",
        "no gradient reaches more.weight, more.bias",
    ),
    "awake": ("queue", '    kept_in_eval = ("teacher",)\n', "", "teacher.backbone, teacher.backbone.patch_embed"),
    "method_call": (
        "labels",
        'self.head(self.backbone(batch["image"]).cls)',
        'self.head.forward(self.backbone(batch["image"]).cls)',
        "head is not called in `forward`",
    ),
    "moves": ("queue", "self.cfg.momentum, self.skipped)", "self.cfg.momentum)", "moved in a skipped step"),
    "average": ("queue", '    averaged = {"student": "teacher"}\n', "", "moves in `after_step`"),
    "memory": ("queue", "        self.queue = Queue", "        self.count = 0\n        self.queue = Queue", ""),
    "coupled": (
        "labels",
        "logits = self.head(",
        'logits = 0.1 * len(batch["image"]) * self.head(',
        "gradients of micro-batches differ",
    ),
    "waits": (
        "labels",
        "        return F.cross_entropy(logits,",
        "        if logits.sum() > 0:\n            logits = logits * 1\n        return F.cross_entropy(logits,",
        "if logits.sum() > 0:: the host reads a value of the device",
    ),
    "option": (
        "labels",
        "    smoothing: float",
        "    more: int = 1\n    smoothing: float",
        "nothing reads objective.more",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_owed_is_named(what: str, tmp_path: Path):
    name, good, bad, says = BROKEN[what]
    text = OWN[name].replace(good, bad, 1)
    assert text != OWN[name]
    if what == "memory":  # a number that is no buffer decides on the loss
        text = text.replace(
            "return F.cross_entropy(logits / self", "return (1 + self.count) * F.cross_entropy(logits / self"
        )
        text = text.replace(
            "    def after_step(self, step):\n", "    def after_step(self, step):\n        self.count += 1\n"
        )
        says = "after its state was loaded into a new objective"
    path = tmp_path / "mine.py"
    path.write_text(text)
    owed: list[str] = []
    for _, lines in contract.check(str(path)):
        owed += lines
        if any(says in line for line in lines):
            return
    pytest.fail(f"{says!r} is not in {owed}")


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ("self.backbone = backbone()", "raise ValueError('no such thing')", "no such thing"),
        (
            "self.backbone = backbone()",
            "self.backbone = backbone().nothing",
            r"cannot be built: AttributeError: .*nothing",
        ),
        ('{"model": Exported', '{"mine": Exported', r"exports\(\) names mine; name the recipe's model"),
        ("class Config(Options)", "class Config", r"has no `@dataclass class Config\(Options\)`"),
    ],
)
def test_what_keeps_it_from_being_built_is_one_line(good: str, bad: str, says: str, tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(OWN["labels"].replace(good, bad))
    with pytest.raises(UserError, match=says):
        list(contract.check(str(path)))


def test_an_option_that_only_a_later_step_reads_is_no_error(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = recipe_file(tmp_path, "labels", "single", shards, "late")
    used = "label_smoothing=self.cfg.smoothing"
    assert used in OWN["labels"]
    (tmp_path / "labels.py").write_text(OWN["labels"].replace(used, f"{used} if step > 3 else 0.0"))
    monkeypatch.chdir(tmp_path)
    train(load(path, ["steps=1", "objective.smoothing=0.3"]))
    assert len(losses(tmp_path / "late")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled(CASES, *SHOWN), ids=str)
def test_it_trains_is_killed_resumes_and_is_scored(case: tuple[str, str], shards: Path, pairs: Path, tmp_path: Path):
    name, mode = case
    data, count = pairs if name == "towers" else shards, MODES[mode]
    whole = recipe_file(tmp_path, name, mode, data, "whole")
    assert wait(started(whole, count)) == 0, Path(f"{whole}.errors").read_text()
    path, run = recipe_file(tmp_path, name, mode, data, "killed"), tmp_path / "killed"
    assert wait(started(path, count, KILL="0 publish 2")) != 0  # rank 0 dies while it writes its second checkpoint
    assert 3 <= len(losses(run)) < 8
    assert wait(started(path, count)) == 0, Path(f"{path}.errors").read_text()
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 8
    assert (run / "export" / "text" / "8" / "config.json").is_file() == (name == "towers")
    done = unlabeled("eval", run / "export" / "8", "knn", f"gallery={shards}", f"query={shards}")
    assert done.returncode == 0 and "knn" in done.stdout, done.stderr
