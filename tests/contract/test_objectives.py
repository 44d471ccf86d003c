"""What every objective owes the loop. Objectives are found by their files, so a new one is tested without a line here.

A new objective that does not train in seconds at the sizes of tests/conftest.py gets an entry in its SMALL.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain import config, objective
from pretrain.checkpoint import all_of
from pretrain.config import ConfigError
from pretrain.export import load as load_export
from pretrain.models.layers import Backbone
from pretrain.parallel.engine import Engine
from pretrain.recipe import load
from pretrain.schedules import Schedule
from pretrain.train import build_objective, build_stream, open_samples, placed, train
from tests.conftest import MORE, SMALL, TEXT, TINY, more, tiny_recipe

NAMES = objective.names()
IMAGES = [name for name in NAMES if name not in TEXT]
everywhere = pytest.mark.parametrize("name", NAMES)


def setup(name: str, shards: Path, run: Path, *overrides: str):
    cfg = tiny_recipe(name, shards, run, *overrides)
    model = build_objective(cfg)
    stream = build_stream(cfg, model, open_samples(cfg))
    return cfg, model, stream, placed(cfg, stream.first(), torch.device("cpu"))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_there_are_objectives():
    assert {"mae", "simclr", "dinov2"} <= set(NAMES)


@everywhere
def test_file_says_what_it_is(name: str):
    assert len(objective.purpose(name)) > 20 and "arXiv" in objective.purpose(name)
    light, _ = objective.config_class(name)
    full = objective.find(name)
    module = __import__(full.__module__, fromlist=["Config"])
    assert [f.name for f in dataclasses.fields(light)] == [f.name for f in dataclasses.fields(module.Config)]


@everywhere
def test_forward_is_finite_and_pure(name: str, shards: Path, tmp_path: Path):
    _, model, _, batch = setup(name, shards, tmp_path / "run")
    loss, logs = model(batch, 0)
    again, _ = model(batch, 0)
    assert loss.ndim == 0 and loss.isfinite() and torch.equal(loss, again)
    assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())


@everywhere
def test_every_trainable_parameter_gets_a_gradient(name: str, shards: Path, tmp_path: Path):
    _, model, _, batch = setup(name, shards, tmp_path / "run")
    model(batch, 0)[0].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@everywhere
def test_frozen_networks_are_never_in_training(name: str, shards: Path, tmp_path: Path):
    """A teacher's positions are as they are, and its drop path and batch norm as in evaluation, also after the loop has called `train`."""
    _, model, _, _ = setup(name, shards, tmp_path / "run")
    frozen = [
        n
        for n, module in model.train().named_modules()
        if module.training
        and any(True for _ in module.parameters())
        and not any(p.requires_grad for p in module.parameters())
    ]
    assert model.training and frozen == []


@everywhere
def test_views_depend_on_the_generator_alone(name: str, shards: Path, tmp_path: Path):
    _, _, stream, batch = setup(name, shards, tmp_path / "run")
    again = stream.batches[0]
    assert all(torch.equal(again[k], stream.batches[0][k]) for k in batch)
    other = stream.batches[1]
    assert any(not torch.equal(other[k], again[k]) for k in batch if k != "id")


@everywhere
def test_encoder_is_a_backbone_that_exports(name: str, shards: Path, tmp_path: Path):
    run = train(tiny_recipe(name, shards, tmp_path / "run", "steps=2"))
    encoder, about = load_export(run / "export" / "2")
    assert isinstance(encoder, Backbone) and about["objective"] == name and about["step"] == 2
    untrained, _ = load_export(run / "export" / "0")
    given, grid = (torch.randint(500, (2, 16)), (16,)) if name in TEXT else (torch.randn(2, 3, 32, 32), (4, 4))
    features, before = encoder(given), untrained(given)
    assert (
        features.cls.shape == (2, encoder.embed_dim)
        and features.tokens.shape == (2, 16, encoder.embed_dim)
        and features.grid == grid
    )
    assert not torch.equal(features.cls, before.cls)


@pytest.mark.slow
@everywhere
def test_learns(name: str, shards: Path, tmp_path: Path):
    """The same small set over and over: the loss falls well below where it began."""
    run = train(tiny_recipe(name, shards, tmp_path / "run", "steps=60", "optim.lr=3e-3", "log=10"))
    curve = losses(run)
    assert sum(curve[-5:]) / 5 < sum(curve[:3]) / 3 - 0.02, curve


@everywhere
def test_resume_is_exact(name: str, shards: Path, tmp_path: Path):
    """Stopped after a checkpoint and started again: every loss equals the uninterrupted run's, to the last bit."""
    options = ["checkpoint=3", *([] if name in TEXT else ["model.drop_path=0.2"])]
    whole = train(tiny_recipe(name, shards, tmp_path / "whole", *options))
    train(tiny_recipe(name, shards, tmp_path / "part", *options))
    for folder in all_of(tmp_path / "part")[1:]:  # what a kill after step 6 would have left
        shutil.rmtree(folder)
    (tmp_path / "part" / "checkpoints" / "latest").unlink()
    rows = (tmp_path / "part" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part" / "metrics.jsonl").write_text("".join(rows[:7]) + '{"step": 7, "lo')
    resumed = train(tiny_recipe(name, shards, tmp_path / "part", *options))
    assert len(losses(whole)) == 8 and losses(resumed) == losses(whole)
    weights = [load_export(run / "export" / "8")[0].state_dict() for run in (whole, resumed)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@everywhere
def test_accumulation(name: str, shards: Path, tmp_path: Path):
    """Micro-batches give the gradient of the whole batch; an objective that couples the batch refuses unless told."""
    split = ["parallel.micro_batch=4"]
    if objective.find(name).couples_batch:
        with pytest.raises(ConfigError, match=f"the loss of {name} couples the samples of a batch"):
            setup(name, shards, tmp_path / "run", *split)
        split.append("parallel.accumulate_coupled=true")
    gradients = []
    for overrides in ([], split):
        cfg, model, stream, _ = setup(name, shards, tmp_path / "run", *overrides)
        engine = Engine(model, cfg, torch.device("cpu"))
        assert engine.accumulate == (4 if overrides else 1)
        fetched = [placed(cfg, next(stream), engine.device) for _ in range(engine.accumulate)]
        for micro, batch in enumerate(engine.micro_batches(fetched)):
            with engine.microbatch(last=micro + 1 == engine.accumulate):
                engine.backward(engine.forward(batch, 0)[0])
        gradients.append(torch.cat([p.grad.flatten() for p in engine.parameters]))
    if not model.couples_batch:
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert gradients[1].isfinite().all()


@everywhere
def test_every_option_is_checked_and_read(name: str, shards: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no such key"):
        load("demo", [f"objective={name}", "objective.no_such_option=1"])
    read = set()
    for options in [[], *([more(name, shards)] if name in MORE else [])]:
        cfg, model, _, batch = setup(name, shards, tmp_path / "run", *options)
        model(batch, 0)
        model.after_step(0)
        read |= vars(cfg.objective)["_read"]
    for field in dataclasses.fields(type(cfg.objective)):
        assert field.name in read, f"nothing reads objective.{field.name}"


class Asked(Schedule):
    """A schedule that remembers for which steps it was asked."""

    def __call__(self, step: int) -> float:
        self.__dict__.setdefault("steps_asked", []).append(step)
        return super().__call__(step)


@everywhere
def test_schedules_are_read_at_the_step(name: str, shards: Path, tmp_path: Path):
    for options in [[], *([more(name, shards)] if name in MORE else [])]:
        cfg, model, _, batch = setup(name, shards, tmp_path / "run", *options)
        schedules = {k: v for k, v in vars(cfg.objective).items() if isinstance(v, Schedule)}
        for schedule in schedules.values():
            schedule.__class__ = Asked
        model(batch, 5)
        model.after_step(5)
        asked = {k: vars(v).get("steps_asked", []) for k, v in schedules.items()}
        assert all(set(steps) <= {5} for steps in asked.values()), asked
        assert any(asked.values()) or not asked


@pytest.mark.parametrize("name", [*IMAGES, "gpt"])
def test_a_key_that_nothing_reads_stops_the_run(name: str, shards: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing reads model.rope_base = 7"):
        train(tiny_recipe(name, shards, tmp_path / "run", "model.rope_base=7", "model.positions=learned"))


@pytest.mark.parametrize(
    ("objective", "model", "says"),
    [("gpt", "vit_micro", "gpt: trains on text, but model.name = vit_micro reads images"),
     ("mae", "gpt_micro", "mae: trains on images, but model.name = gpt_micro reads text")],
)  # fmt: skip
def test_a_model_that_reads_something_else_is_refused(objective: str, model: str, says: str):
    with pytest.raises(ConfigError, match=says):
        build_objective(load("demo", [f"objective={objective}", f"model={model}"]))


@pytest.mark.slow
def test_bf16_stays_close_to_fp32(shards: Path, tmp_path: Path):
    for name in NAMES:
        curves = [
            losses(train(tiny_recipe(name, shards, tmp_path / f"{name}-{p}", f"precision={p}", "optim.lr=1e-5")))
            for p in ("fp32", "bf16")
        ]
        assert curves[0] != curves[1] and curves[0][0] == pytest.approx(curves[1][0], rel=1e-2), name
        assert curves[0] == pytest.approx(curves[1], rel=2e-2), name  # on all batches, with little drift between


def test_small_entries_belong_to_objectives():
    assert set(SMALL) <= set(NAMES) and config.to_dict(load("demo", TINY))["model"]["dim"] == 32
