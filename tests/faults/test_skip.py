"""A step with a NaN changes nothing; too many such steps end the run and name their samples; outliers of the loss
are skipped if the recipe asks for it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from data_pipeline.stream.stream import Stream
from pretrain import train as training
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.loop_step import train_step
from pretrain.metrics import Clock
from pretrain.objectives import finder
from pretrain.optim.skip_steps import WINDOW, Guard
from pretrain.parallel.engine import Engine
from pretrain.parallel.processes import Agreement
from pretrain.recipes.recipe import Recipe, load
from pretrain.recipes.sections import Skip
from pretrain.signals import Stop
from tests.conftest import BY_PROPERTY, QUICK, sampled, tiny_recipe
from tests.services import FaultProxy, ObjectStore

CPU = torch.device("cpu")


def one_step(cfg: Recipe, step: int, engine: Engine, stream: Stream, guard: Guard) -> dict[str, torch.Tensor | float]:
    return train_step(cfg, step, engine, stream, guard, Clock(), Stop(), Agreement())


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    state = {f"model.{k}": v.clone() for k, v in engine.objective.state_dict().items()}
    for i, p in enumerate(engine.parameters):
        state |= {f"optimizer.{i}.{k}": v.clone() for k, v in engine.optimizer.state[p].items()}
    return state


def poison(engine: Engine, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of the next steps, or only one gradient, not finite."""
    if what == "gradient":
        monkeypatch.setattr(
            engine, "backward", lambda loss: (loss.backward(), engine.parameters[-1].grad.view(-1)[:1].fill_(math.nan))
        )
    else:
        forward = engine.forward
        value = float(what)

        def bad(batch, step):
            loss, logs = forward(batch, step)
            return loss * value, logs

        monkeypatch.setattr(engine, "forward", bad)


@pytest.mark.parametrize("what", sampled(["nan", "inf", "gradient"], "nan", others=pytest.mark.slow))
@pytest.mark.parametrize("name", sampled(finder.names(), *BY_PROPERTY, quick=(*QUICK, "simclr")))
def test_nothing_changes(name: str, what: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights, optimizer, teacher and buffers are bit-equal before and after a skipped step, and the next good step
    changes them."""
    more = ["model=resnet_micro"] if name == "simclr" else []
    cfg = tiny_recipe(name, shards, tmp_path / "run", "optim.clip=1.0")
    if more:  # batch norm: running means change in the forward
        cfg = load(
            "demo",
            [
                f"objective={name}",
                *more,
                "precision=fp32",
                f"data.train={shards}",
                "data.batch=4",
                "data.workers=0",
                "steps=8",
                f"run={tmp_path / 'run'}",
            ],
        )
    model = build_objective(cfg)
    stream = build_stream(cfg, model, open_samples(cfg))
    engine = Engine(model, cfg, CPU)
    guard = Guard(model, cfg.skip, CPU)
    for step in range(2):
        one_step(cfg, step, engine, stream, guard)
    before = snapshot(engine)
    with monkeypatch.context() as patch:
        poison(engine, what, patch)
        values = one_step(cfg, 2, engine, stream, guard)
    after = snapshot(engine)
    assert values["skipped"] == 1 and before.keys() == after.keys()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    assert one_step(cfg, 3, engine, stream, guard)["skipped"] == 0
    moved = snapshot(engine)
    assert any(not torch.equal(after[k], moved[k]) for k in after)
    for average in model.averaged.values():
        assert any(not torch.equal(after[k], moved[k]) for k in after if k.startswith(f"model.{average}."))


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward = Engine.forward

    def bad(self, batch, step):
        loss, logs = forward(self, batch, step)
        return (loss * math.nan if step >= 3 else loss), {**logs, "term": loss.detach() / (0.0 if step >= 3 else 1.0)}

    monkeypatch.setattr(Engine, "forward", bad)
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "steps=40", "skip=2", "log=4", "data.batch=8")
    with pytest.raises(
        UserError,
        match=r"3 steps in a row were skipped \(skip.most = 2\), .*step 5: loss = nan, term = inf.* in .*\.tar",
    ):
        training.train(cfg)
    found = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [f["step"] for f in found] == [3, 4, 5] and all(len(f["samples"]) == 8 for f in found)
    keys = {key for f in found for _, key in f["samples"]}
    assert len(keys) > 12
    assert "step 3 changed nothing" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_samples_of_a_skipped_step_cost_no_requests(
    store: ObjectStore, proxy: FaultProxy, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shard and number of each sample are known from the index: a store whose requests take seconds is not asked."""
    url = store.put_folder(shards, "skipped")
    cfg = tiny_recipe("mae", shards, tmp_path / "run", f"data.train={url}")
    model = build_objective(cfg)
    stream = build_stream(cfg, model, open_samples(cfg))
    proxy.set(latency=2.0)
    proxy.requests.clear()
    began = time.monotonic()
    row = {"step": 5, "loss": math.nan, "skipped": 1.0}
    Guard(model, cfg.skip, CPU).read([row], tmp_path, stream, lambda line: None)
    assert not proxy.requests and time.monotonic() - began < 2.0
    (entry,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    proxy.set()
    stream.seek(5)
    numbers = next(stream)["id"].tolist()  # of a single shard
    stream.close()
    assert entry["samples"] == [[f"{url}/000000.tar", number] for number in numbers]


def test_one_bad_step_is_said_and_the_run_goes_on(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward = Engine.forward
    monkeypatch.setattr(
        Engine,
        "forward",
        lambda self, b, s: (lambda out: (out[0] * (math.nan if s == 3 else 1), out[1]))(forward(self, b, s)),
    )
    run = training.train(tiny_recipe("mae", shards, tmp_path / "run", "steps=6"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("skipped", 0) for r in rows] == [0, 0, 0, 1, 0, 0] and math.isfinite(rows[-1]["loss"])


def test_outliers_of_the_loss():
    guard = Guard(nn.Linear(2, 2), Skip(sigma=6.0), CPU)
    torch.manual_seed(0)
    normal = 2 + 0.1 * torch.randn(3 * WINDOW)
    norm = torch.tensor(1.0)
    assert not any(guard.judge(x, norm) for x in normal)
    assert guard.judge(torch.tensor(2.9), norm) == 1 and guard.judge(torch.tensor(2.3), norm) == 0
    early = Guard(nn.Linear(2, 2), Skip(sigma=6.0), CPU)
    assert not any(early.judge(torch.tensor(x), norm) for x in (1.0, 1.0, 1.0, 50.0))  # the window is not full
    off = Guard(nn.Linear(2, 2), Skip(), CPU)
    assert not any(off.judge(x, norm) for x in normal) and off.judge(torch.tensor(1e9), norm) == 0
    again = Guard(nn.Linear(2, 2), Skip(sigma=6.0), CPU)
    again.load_state_dict(guard.state_dict())
    assert again.judge(torch.tensor(9.0), norm) == 1
