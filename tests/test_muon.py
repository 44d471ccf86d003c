"""Muon: its formula compared with loops in float64 and with torch's Muon, the parameters that it updates, and
resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import ConfigError
from launch.local import environments, wait
from pretrain.models import presets
from pretrain.models.build import build_model
from pretrain.ops import matrix_exchange
from pretrain.ops.matrix_exchange import assign, rounds_of
from pretrain.ops.parameter_shards import whole
from pretrain.optim.groups import make_optimizer
from pretrain.optim.muon import MuonAdamW, orthogonalise
from pretrain.parallel import processes
from pretrain.recipes import parallel_checks
from pretrain.recipes.sections import Optim
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.forked import Forked


def group(*matrices: Tensor, parts: tuple[int, ...] = ()) -> dict:
    return {"params": [torch.nn.Parameter(m.clone()) for m in matrices], "muon": True, "parts": parts}


def naive_newton_schulz(m: Tensor) -> Tensor:
    """By singular values: each step maps s to 3.4445 s − 4.7750 s³ + 2.0315 s⁵."""
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
    """The root mean square is 0.2 for any shape."""
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


def held_by(layout: str, *matrices: Tensor) -> list[Tensor]:
    """Parameters as in this mode: whole, or with the rows of the shards of FSDP2 or HSDP."""
    if layout == "replicated":
        return [m.clone() for m in matrices]
    ranks = processes.world()
    shape, names = ((ranks,), ("shard",)) if layout == "sharded" else ((2, ranks // 2), ("replicate", "shard"))
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    return [distribute_tensor(m.clone(), mesh, placements) for m in matrices]


SHAPES: list[tuple[int, int, tuple[int, ...]]] = [  # rows, columns, parts: several of one shape, and uneven rows
    *[(9, 4, (2, 3, 4))] * 3,
    *[(12, 16, ())] * 8,
    (6, 10, (3, 3)),
    (3, 5, ()),
]


def three_steps(layout: str) -> dict[str, Any]:
    """Weights and momentum after two steps and a skipped one, and the FLOPs of this rank's products in the first
    step."""
    torch.manual_seed(0)
    starts = [torch.randn(r, c, dtype=torch.float64) for r, c, _ in SHAPES]
    gradients = [[torch.randn(r, c, dtype=torch.float64) for r, c, _ in SHAPES] for _ in range(3)]
    weights = [torch.nn.Parameter(each) for each in held_by(layout, *starts)]
    groups = [{"params": [w], "muon": True, "parts": parts} for w, (*_, parts) in zip(weights, SHAPES, strict=True)]
    optimizer = MuonAdamW(groups, 0.9, (0.9, 0.99), 1e-8)
    flops = []
    for step, own in enumerate(gradients):
        for n, g in enumerate(optimizer.param_groups):
            g.update(lr=0.02 * (1 + n), weight_decay=0.1)
        for w, g in zip(weights, held_by(layout, *own), strict=True):
            w.grad = g * torch.nan if step == 2 else g
        optimizer.found_inf = torch.tensor(float(step == 2))
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        flops.append(counter.get_total_flops())
    momentum = [optimizer.state[w]["momentum_buffer"] for w in weights]
    return {"weights": [whole(w) for w in weights], "momentum": [whole(m) for m in momentum], "flops": flops[0]}


def write_three_steps(layouts: list[str], folder: Path) -> None:
    processes.start("ddp", torch.device("cpu"))
    torch.set_num_threads(1)
    torch.save({layout: three_steps(layout) for layout in layouts}, folder / f"{processes.rank()}.pt")
    processes.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_orthogonalises_its_share(ranks: int, tmp_path: Path):
    """The weights on all ranks are those of one process, and each rank computes about 1/ranks of the products."""
    alone = three_steps("replicated")
    layouts = ["replicated", "sharded", "both"]
    started = [Forked(write_three_steps, layouts, tmp_path, env=environment) for environment in environments(ranks)]
    assert wait(started) == 0
    ranks_found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for layout in layouts:
        found = [own[layout] for own in ranks_found]
        for own in found:
            for kind in ("weights", "momentum"):
                for value, expected in zip(own[kind], alone[kind], strict=True):
                    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        flops = [own["flops"] for own in found]
        assert sum(flops) == alone["flops"] > 0
        assert max(flops) < 1.5 * alone["flops"] / ranks


def test_work_is_distributed_evenly_and_stacked_by_shape(monkeypatch: pytest.MonkeyPatch):
    assigned = assign([3.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], 4)
    assert sorted(i for own in assigned for i in own) == list(range(7))
    assert max(sum([3.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0][i] for i in own) for own in assigned) == 3.0
    monkeypatch.setattr(matrix_exchange, "MAX_STACK_ELEMENTS", 200)
    kinds, sizes = [("a",), ("b",), ("a",), ("a",)], [100, 300, 100, 100]
    assert rounds_of([[0, 1, 2, 3], []], kinds, sizes) == [[[0, 2], []], [[3], []], [[1], []]]


def test_it_takes_the_matrices_inside_of_blocks():
    body = build_model(preset("vit", depth=2, dim=32, heads=2, image_size=32, patch_size=8))
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
        make_optimizer(build_model(preset("resnet_micro")), Optim(name="muon"))
    for options in (["parallel.mode=zero2"], ["parallel.mode=fsdp2", "parallel.offload=true"]):
        cfg = tiny_recipe("mae", Path("none"), Path("none"), "optim.name=muon", *options)
        with pytest.raises(ConfigError, match=r"optim.name = muon: .*; write parallel.mode=fsdp2 without offload"):
            parallel_checks.check(cfg, 2)


def preset(name: str, **options):
    kind, values = presets.choose(name)
    cfg = kind(**(values | options))
    cfg.name = name
    return cfg


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lars"])
def test_a_decay_branches_from_a_checkpoint(name: str, shards: Path, tmp_path: Path):
    """A run with a constant rate, continued from its checkpoint in another folder with fewer steps, equals a run
    that had this number of steps from its start."""
    common = [f"optim.name={name}", "optim.lr.kind=wsd", "optim.lr.warmup=2", "optim.lr.decay=3", "checkpoint=4"]
    stable = train(tiny_recipe("mae", shards, tmp_path / "stable", *common, "steps=12", "checkpoint.keep=9"))
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", *common, "steps=8"))
    resume = f"checkpoint.resume={stable / 'checkpoints' / '000000004'}"
    branch = train(tiny_recipe("mae", shards, tmp_path / "branch", *common, "steps=8", resume))
    assert {step: loss for step, loss in losses(whole).items() if step >= 4} == losses(branch)
    assert losses(whole)[7] != losses(stable)[7]  # it has decayed
    said = (branch / "log.txt").read_text()
    assert "resumes from step 4" in said and "optim.lr is" not in said
    late = f"checkpoint.resume={stable / 'checkpoints' / '000000012'}"  # the stable run's own decay is over there
    run = train(tiny_recipe("mae", shards, tmp_path / "late", *common, "steps=16", late))
    assert "optim.lr is 0.001 at step 12; in the run of the checkpoint it was 0" in (run / "log.txt").read_text()
