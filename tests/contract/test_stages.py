"""DINOv3's published stages in order, as recipes at reduced width; each stage starts from the folder of the previous
one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.contract import VIT
from pretrain.interchange.export import load as load_export
from pretrain.recipes import recipe
from pretrain.train import train
from tests.conftest import TINY, unlabeled
from tests.contract.test_recipes import RUN_SIZES

SIZES = "objective.resolutions=[[32, 16, 48, 0.5], [48, 16, 64, 0.5]]"
STEPS = 3


def options(shards: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.train={shards}", "data.batch=16", "data.workers=0", f"steps={STEPS}", f"run={run}"]
    return [*TINY, *data, "checkpoint=1", "export=1", "log=1", "log.flops=false", "parallel.micro_batch=null", *more]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    """Whether two exports hold the same weights."""
    a, b = (load_export(path)[0].state_dict() for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_pretrain_gram_highres_distil(shards: Path, tmp_path: Path):
    """Pretraining, the Gram stage (with equal numbers on one process and on two), the high-resolution stage, and two
    students of its teacher."""
    first, second, third, last = (tmp_path / name for name in ("pretrain", "gram", "highres", "distil"))
    train(recipe.load("dinov3_vit7b16_pretrain", options(shards, first, *RUN_SIZES)))

    teacher = f"objective.gram_teacher={first / 'export' / '1'}"
    gram = [*RUN_SIZES, f"init.run={first}", teacher, "objective.gram_size=64"]
    gram += ["model.rope_rescale=null", "model.drop_path=0.0"]  # which each process draws for itself
    train(recipe.load("dinov3_vit7b16_gram", options(shards, second, *gram)))
    assert same(second / "export" / "0", first / "export" / str(STEPS))
    pair = options(shards, tmp_path / "pair", *gram, "parallel.mode=fsdp2")
    done = unlabeled("train", "dinov3_vit7b16_gram", "--processes", "2", *pair)
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(rows(second), rows(tmp_path / "pair"), strict=True):
        for key in ("loss", "dino_local", "dino_global", "ibot", "koleo", "gram", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (one["step"], key)

    sizes = [*RUN_SIZES, f"init.run={tmp_path / 'pair'}", SIZES, "objective.local_size=96"]
    train(recipe.load("dinov3_vit7b16_highres", options(shards, third, *sizes)))
    assert same(third / "export" / "0", tmp_path / "pair" / "export" / str(STEPS))
    assert all(row["gram"] > 0 for row in rows(third))

    students = [f"objective.teacher={third}", "objective.students=[convnext_micro]", "objective.local_size=32"]
    train(recipe.load("dinov3_distill_multi", options(shards, last, *students)))
    assert all(math.isfinite(row[f"{name}/loss"]) for row in rows(last) for name in ("model", "convnext_micro"))
    for folder in (last / "export", last / "export" / "convnext_micro"):
        assert not same(folder / "0", folder / str(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet_micro"])
def test_a_backbone_is_continued_on_two_processes(model: str, shards: Path, tmp_path: Path):
    """Two processes, of which the second starts without weights, train as one process does: parameters and
    statistics of batch norm are equal."""
    own = [f"model={model}", *(VIT[1:] if model == "vit" else [])]
    common = [o for o in options(shards, tmp_path / "first") if not o.startswith(("model", "run="))]
    small = [*own, "objective.head_hidden=64", "objective.head_outputs=32", "optim.lr=1e-3"]
    train(recipe.load("demo", [*common, *small, f"run={tmp_path / 'first'}"]))
    source = tmp_path / "first" / "export" / str(STEPS)
    more = [*common, *small, f"init.backbone={source}", "seed=7"]
    train(recipe.load("demo", [*more, f"run={tmp_path / 'one'}"]))
    done = unlabeled(
        "train", "demo", "--processes", "2", *more, f"run={tmp_path / 'two'}", "parallel.mode=fsdp2", timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(tmp_path / "two" / "export" / "0", source)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    one, two = (
        (tmp_path / name / "log.txt").read_text().rpartition(": trained on ")[2].splitlines()[0]
        for name in ("one", "two")
    )
    assert one == two and one.endswith(
        "samples that lack a part were skipped 0 times; 0 were damaged and replaced by neighbours"
    )
