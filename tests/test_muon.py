"""Muon: its formula against loops in float64 and against torch's own, which parameters it takes, and runs that go on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.config import ConfigError
from pretrain.models import presets
from pretrain.muon import MuonAdamW, orthogonalise
from pretrain.optim import make_optimizer
from pretrain.parallel import rules
from pretrain.recipe import Optim
from pretrain.train import train
from tests.conftest import tiny_recipe


def group(*matrices: Tensor, parts: tuple[int, ...] = ()) -> dict:
    return {"params": [torch.nn.Parameter(m.clone()) for m in matrices], "muon": True, "parts": parts}


def naive_newton_schulz(m: Tensor) -> Tensor:
    """By singular values: each step sends s to 3.4445 s − 4.7750 s³ + 2.0315 s⁵."""
    u, s, v = torch.linalg.svd(m, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_newton_schulz_moves_singular_values_alone(shape):
    m = torch.randn(3, *shape, dtype=torch.float64)
    expected = torch.stack([naive_newton_schulz(each) for each in m])
    torch.testing.assert_close(orthogonalise(m), expected, rtol=1e-9, atol=1e-9)


def test_three_steps_are_those_of_the_formula():
    torch.manual_seed(0)
    start, lr, wd, mu = torch.randn(9, 4, dtype=torch.float64), 0.02, 0.1, 0.9
    gradients = [torch.randn(9, 4, dtype=torch.float64) for _ in range(3)]
    given = group(start, parts=(2, 3, 4))
    optimizer = MuonAdamW([given], mu, (0.9, 0.99), 1e-8)
    expected, buffer = start.clone(), torch.zeros(9, 4, dtype=torch.float64)
    for g in gradients:
        optimizer.param_groups[0].update(lr=lr, weight_decay=wd)
        given["params"][0].grad = g.clone()
        optimizer.step()
        buffer = mu * buffer + (1 - mu) * g
        update = (1 - mu) * g + mu * buffer
        for rows in (slice(0, 2), slice(2, 5), slice(5, 9)):
            own = update[rows]
            expected[rows] = expected[rows] * (1 - lr * wd) - lr * 0.2 * 4**0.5 * naive_newton_schulz(own)
    torch.testing.assert_close(given["params"][0].detach(), expected, rtol=1e-9, atol=1e-9)


def test_it_is_torchs_muon_but_for_bf16():
    torch.manual_seed(0)
    start = torch.randn(32, 64)
    ours = group(start)
    theirs = torch.nn.Parameter(start.clone())
    mine = MuonAdamW([ours], 0.95, (0.9, 0.99), 1e-8)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        mine.param_groups[0].update(lr=0.01, weight_decay=0.1)
        g = torch.randn(32, 64)
        ours["params"][0].grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        other.step()
    moved = (theirs.detach() - start).norm()
    assert (ours["params"][0].detach() - theirs.detach()).norm() < 0.02 * moved  # theirs iterates in bf16
    assert moved > 0.1


def test_an_update_is_as_long_as_adamws():
    """Root mean square 0.2, whatever the shape."""
    for shape in ((64, 256), (256, 64), (128, 128)):
        given = group(torch.zeros(shape))
        optimizer = MuonAdamW([given], 0.95, (0.9, 0.99), 1e-8)
        optimizer.param_groups[0].update(lr=1.0, weight_decay=0.0)
        given["params"][0].grad = torch.randn(shape)
        optimizer.step()
        assert given["params"][0].detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_a_step_that_is_not_finite_changes_nothing():
    given, rest = group(torch.randn(4, 4)), {"params": [torch.nn.Parameter(torch.randn(4))], "muon": False}
    optimizer = MuonAdamW([given, rest], 0.95, (0.9, 0.99), 1e-8)
    both = [*given["params"], *rest["params"]]

    def step(value: float, found: float) -> None:
        for g in optimizer.param_groups:
            g.update(lr=0.1, weight_decay=0.1)
        for p in both:
            p.grad = torch.full_like(p, value)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()

    step(0.5, 0.0)
    before = [p.detach().clone() for p in both], [s.clone() for p in both for s in optimizer.state[p].values()]
    step(float("nan"), 1.0)
    after = [p.detach() for p in both], [s for p in both for s in optimizer.state[p].values()]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_it_takes_the_matrices_inside_of_blocks():
    body = presets.build(preset("vit", depth=2, dim=32, heads=2, image_size=32, patch_size=8))
    names = {p: name for name, p in body.named_parameters()}
    optimizer = make_optimizer(body, Optim(name="muon", layer_decay=0.5))
    taken = {names[p]: g["parts"] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    expected = {}
    for block in ("blocks.0.", "blocks.1."):
        expected[f"{block}attn.qkv.weight"] = (32, 32, 32)
        expected |= {f"{block}{rest}.weight": () for rest in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    assert taken == expected
    rates = {names[p]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert rates["blocks.0.mlp.fc1.weight"] == rates["blocks.0.mlp.fc1.bias"] == 0.25


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"optim.name = muon: this model's blocks have no trained matrices"):
        make_optimizer(presets.build(preset("resnet_micro")), Optim(name="muon"))
    for options in (["parallel.mode=zero2"], ["parallel.mode=fsdp2", "parallel.offload=true"]):
        cfg = tiny_recipe("mae", Path("none"), Path("none"), "optim.name=muon", *options)
        with pytest.raises(ConfigError, match=r"optim.name = muon: .*; write parallel.mode=fsdp2 without offload"):
            rules.check(cfg, 2)


def preset(name: str, **options):
    kind, values = presets.choose(name)
    cfg = kind(**(values | options))
    cfg.name = name
    return cfg


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_decay_branches_from_a_checkpoint(name: str, shards: Path, tmp_path: Path):
    """A stable run's checkpoint, continued in another folder with a shorter horizon, is the run that had that horizon from its start."""
    common = [f"optim.name={name}", "optim.lr.kind=wsd", "optim.lr.warmup=2", "optim.lr.decay=3", "checkpoint=4"]
    stable = train(tiny_recipe("mae", shards, tmp_path / "stable", *common, "steps=12", "checkpoint.keep=9"))
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", *common, "steps=8"))
    resume = f"checkpoint.resume={stable / 'checkpoints' / '000000004'}"
    branch = train(tiny_recipe("mae", shards, tmp_path / "branch", *common, "steps=8", resume))
    assert {step: loss for step, loss in losses(whole).items() if step >= 4} == losses(branch)
    assert losses(whole)[7] != losses(stable)[7]  # it has decayed
    said = (branch / "log.txt").read_text()
    assert "goes on from step 4" in said and "optim.lr is" not in said
    late = f"checkpoint.resume={stable / 'checkpoints' / '000000012'}"  # the stable run's own decay is over there
    run = train(tiny_recipe("mae", shards, tmp_path / "late", *common, "steps=16", late))
    assert "optim.lr is 0.001 at step 12; where the checkpoint comes from, it is 0" in (run / "log.txt").read_text()
