"""`unlabeled plan`: its memory equals that of real steps, its FLOPs and bytes follow formulas that are written here,
and it refuses recipes that it cannot plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.errors import ConfigError
from pretrain.build import build_objective
from pretrain.estimate import plan, trace
from pretrain.models.layers import Block
from pretrain.objectives import finder
from pretrain.optim.groups import make_optimizer
from pretrain.parallel import fsdp2
from pretrain.parallel.deepspeed import AUTOCAST
from pretrain.recipes.recipe import Recipe, load
from tests.conftest import sampled, unlabeled
from tests.conftest import tiny as overrides_of
from tests.launch.test_cli import startup_ratio

NAMES = finder.names()
ROOT = Path(__file__).parents[2]


def tiny(name: str, *overrides: str, shards: Path = Path("/nowhere")) -> Recipe:
    """`shards`: for an objective that needs a run or an export."""
    own = overrides_of(name, shards)
    return load("demo", [f"objective={name}", *own, "data.batch=16", "device=cpu", *overrides])


# ---------------------------------------------------------------- memory
def ratios(*options: str) -> dict[str, float]:
    """The figures of benchmarks/plan.py, measured in separate processes."""
    command = [sys.executable, str(ROOT / "benchmarks" / "plan.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row["value"] for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(NAMES, "gpt"))
def test_memory_is_what_a_run_takes(name: str):
    (ratio,) = ratios("--modes", "single", "--objectives", name).values()
    assert ratio == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("mode", sampled(["ddp", "fsdp2"], "fsdp2"))
def test_memory_is_what_each_of_two_processes_takes(mode: str):
    """Of DINOv2."""
    assert ratios("--modes", mode)[f"plan.memory.{mode}.versus_measured"] == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_peak_is_that_of_torchs_own_tracker(name: str):
    """torch's MemTracker, which refuses frozen modules and is three times as slow, counts the same bytes."""
    cfg, tracker = tiny(name), MemTracker()
    with trace._trace_environment(1), FakeTensorMode(allow_non_fake_inputs=True), trace._Real():
        model = build_objective(cfg)
        optimizer = make_optimizer(model, cfg.optim)
        batch = trace.example(cfg, model, 16)
        tracker.track_external(model, optimizer, *batch.values())
        with tracker:
            for _ in range(2):
                model(batch, 0)[0].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert plan.trace(cfg, 1).peak == pytest.approx(peak["Total"], rel=0.01)


@pytest.mark.slow
def test_another_device_is_planned_by_its_own_operations():
    """On a GPU, documents have no mask of T × T, and norms keep no copies in fp32; the products are the same."""
    here, there, dense = (
        plan.trace(tiny("gpt", "precision=bf16", "model.mlp=swiglu", "data.length=128", "model.context=128", *own), 1)
        for own in (["device=cpu"], ["device=cuda"], ["device=cuda", "parallel.attention=sdpa"])
    )
    assert dense.memory["activations"] - there.memory["activations"] >= 16 * 128 * 128
    assert there.memory["activations"] < 0.97 * here.memory["activations"]
    assert there.flops == dense.flops == pytest.approx(here.flops, rel=0.05)


@pytest.mark.slow
def test_categories_are_those_of_the_parameters():
    cfg = tiny("dinov2", "data.batch=4")
    model = build_objective(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = plan.trace(cfg, 1)
    assert found.trained == found.frozen == trained
    assert found.memory["parameters"] == found.memory["teacher"] == 4 * trained
    steps = 4 * len([p for p in model.parameters() if p.requires_grad])  # AdamW counts them by parameter
    assert found.memory["optimizer"] == 8 * trained + steps
    assert found.peak == sum(found.memory.values()) and found.collectives == {}
    assert plan.trace(tiny("dinov2", "data.batch=4", "optim=lars"), 1).memory["optimizer"] == 4 * trained


@pytest.mark.slow
def test_memory_of_each_mode():
    """Compared with formulas: sharded memory is divided, activations are those of the process's samples, all other
    memory is whole."""
    common = ["model.depth=1", "objective.local_crops=1"]
    one = plan.trace(tiny("dinov2", *common), 1)
    parts = {
        mode: plan.trace(tiny("dinov2", *common, f"parallel.mode={mode}"), 4) for mode in ("ddp", "fsdp2", "zero2")
    }
    assert {found.micro for found in parts.values()} == {4}
    for found in parts.values():
        assert one.memory["activations"] / 4 < found.memory["activations"] < one.memory["activations"] / 2
    whole = one.memory["parameters"]
    assert parts["ddp"].memory["parameters"] == parts["ddp"].memory["buffers"] == whole
    assert "gradients" not in parts["ddp"].memory  # they are views of the buffers
    for name in ("parameters", "optimizer", "teacher"):
        assert parts["fsdp2"].memory[name] == one.memory[name] // 4
    assert parts["zero2"].memory["parameters"] == parts["zero2"].memory["teacher"] == whole
    assert parts["zero2"].memory["optimizer"] == int(one.memory["optimizer"] * 1.5 / 4)
    replicated = plan.trace(tiny("dinov2", *common, "parallel.mode=fsdp2", "parallel.replicate=2"), 4)
    assert replicated.memory["parameters"] == whole // 2


def test_gradients_stay_whole_until_they_cross_processes():
    common = ["data.batch=32", "parallel.mode=fsdp2", "objective.decoder_dim=256"]
    assert plan.shares(tiny("mae", *common), 4, accumulate=1, states=2)["gradients"] == 1 / 4
    assert plan.shares(tiny("mae", *common), 4, accumulate=2, states=2)["gradients"] == 1


@pytest.mark.slow
def test_offloading_moves_bytes_to_main_memory():
    cut = plan.trace(tiny("mae", "parallel.mode=fsdp2"), 4)
    away = plan.trace(tiny("mae", "parallel.mode=fsdp2", "parallel.offload=true"), 4)
    assert away.host["parameters"] == cut.memory["parameters"] and away.host["optimizer"] == 2 * away.host["parameters"]
    assert not away.memory.keys() & {"parameters", "gradients", "optimizer"}
    lars = plan.trace(tiny("mae", "parallel.mode=fsdp2", "parallel.offload=true", "optim=lars"), 4)
    assert lars.host["optimizer"] == lars.host["parameters"]  # one state
    assert away.peak < cut.peak


@pytest.mark.parametrize(("accumulate", "traced"), [(1, 1), (2, 2), (3, 3), (4, 2), (9, 3), (25, 5)])
def test_traced_micro_batches_divide_those_of_a_step(accumulate: int, traced: int):
    """So that a queue whose size is a multiple of the global batch is also a multiple of the traced batch."""
    assert trace._enough_micro_batches(accumulate) == traced


@pytest.mark.slow
def test_recomputation_trades_activations_for_flops():
    common = ["model.depth=4", "data.batch=64", "device=cuda"]  # a CPU keeps less than selective recomputation does
    none, some, full = (
        plan.trace(tiny("simclr", *common, f"parallel.recompute={how}"), 1) for how in ("none", "selective", "full")
    )
    assert none.memory["activations"] > some.memory["activations"] > full.memory["activations"]
    assert none.flops == some.flops == full.flops == none.computed
    assert full.flops * 1.1 < full.computed < full.flops * 4 / 3


@pytest.mark.slow
def test_bf16_keeps_a_cast_of_the_weights():
    """Autocast's copies are needed until the end of the backward; if units are gathered in bf16, there are none."""
    found = plan.trace(
        tiny("simclr", "precision=bf16", "model.dim=128", "device=cuda"), 1
    )  # on a CPU, they are made anew
    assert 0.4 < found.memory["casts"] / found.memory["parameters"] <= 0.5
    assert "casts" not in plan.trace(tiny("simclr", "precision=bf16", "parallel.mode=fsdp2"), 2).memory


# ---------------------------------------------------------------- FLOPs
def blocks(tokens: int, dim: int, depth: int, batch: int) -> float:
    """FLOPs of forward and backward of transformer blocks whose MLPs are four times as wide: 6 for each token and
    weight of a linear layer. Attention has two products of N×N×D, and five in its backward, which repeats one of
    them."""
    return depth * batch * (6 * tokens * 12 * dim**2 + 2 * (2 + 5) * tokens**2 * dim)


@pytest.mark.slow
def test_flops_of_mae_are_those_of_a_hand_count():
    depths = ["model.depth=3", "objective.decoder_depth=2"]
    cfg = load("mae_vits16", ["data.batch=64", "parallel.micro_batch=32", *depths])
    batch, patches, kept = 64, 196, 49
    pixels = 16 * 16 * 3
    hand = blocks(1 + kept, 384, 3, batch) + blocks(1 + patches, 512, 2, batch)
    hand += 4 * batch * patches * pixels * 384  # images want no gradient
    hand += 6 * batch * ((1 + kept) * 384 * 512 + (patches - kept) * 512 * pixels)
    assert plan.trace(cfg, 1).flops == pytest.approx(hand, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_flops_of_simclr_are_those_of_a_hand_count(processes: int):
    mode = ["parallel.mode=ddp"] if processes > 1 else []
    cfg = load("simclr_vits16", ["data.batch=64", "model.depth=3", *mode])
    images = 2 * 64
    hand = blocks(1 + 196, 384, 3, images) + 4 * images * 196 * 768 * 384
    hand += 6 * images * (384 * 2048 + 2048 * 128) + 6 * images**2 * 128  # head; similarities of all pairs
    assert plan.trace(cfg, processes).flops == pytest.approx(hand, rel=0.01)


# ---------------------------------------------------------------- traffic
@pytest.mark.slow
def test_traffic_by_formulas():
    common = ["data.batch=32", "parallel.micro_batch=4", "model.depth=1", "objective.decoder_depth=1"]
    cfg = tiny("mae", *common)
    size = 4 * plan.trace(cfg, 1).trained

    def traffic(*overrides: str) -> dict[str, int]:
        return plan.trace(tiny("mae", *common, *overrides), 4).collectives

    again = 4 * (32 * 32 + 32)  # `embed` is called twice: for patches and for the class token
    embedding = ("cls_token", "pos_embed", "patch_embed.weight", "patch_embed.bias")
    own = {"backbone": (*embedding, "norm.weight", "norm.bias"), "": ("mask_token",)}
    model = build_objective(cfg)
    roots = 4 * sum(model.get_submodule(root).get_parameter(name).numel() for root in own for name in own[root])
    gathered = 2 * (2 * (size + again) - roots)  # the roots stay gathered between forward and backward
    assert traffic("parallel.mode=ddp") == {"all-reduce": size}  # once, though there are two micro-batches
    assert traffic("parallel.mode=fsdp2") == {"all-gather": gathered, "reduce-scatter": size}
    halves = traffic("parallel.mode=fsdp2", "parallel.replicate=2")
    assert halves == {"all-gather": gathered, "reduce-scatter": size, "all-reduce": size // 2}
    assert traffic("parallel.mode=fsdp2", "precision=bf16")["all-gather"] == gathered // 2
    assert traffic("parallel.mode=zero1") == {"all-reduce": size, "all-gather": size}
    assert traffic("parallel.mode=zero2") == {"all-reduce": 2 * size, "all-gather": size}
    assert traffic("parallel.mode=zero3") == {"all-gather": 2 * size, "reduce-scatter": 2 * size}
    layers = [m for m in model.modules() if isinstance(m, AUTOCAST)]  # gathered in the compute dtype
    halves = 2 * sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))
    found = traffic("parallel.mode=zero3", "precision=bf16")
    assert found == {"all-gather": 2 * (size - halves), "reduce-scatter": 2 * size}


@pytest.mark.slow
def test_what_muon_exchanges_counts():
    """Matrices are sent once in `ddp`, and to the owner and back in `fsdp2`; each rank computes its share of them."""
    model = build_objective(tiny("mae"))
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    matrices = 4 * sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    muon = plan.trace(tiny("mae", "optim=muon", "parallel.mode=ddp"), 2).collectives
    assert muon["all-gather"] == pytest.approx(matrices, rel=0.3)  # padded to the larger of two shares
    sharded = plan.trace(tiny("mae", "optim=muon", "parallel.mode=fsdp2"), 2).collectives
    assert sharded["all-to-all"] == 2 * muon["all-gather"]


def test_what_the_loss_gathers_counts():
    found = plan.trace(tiny("simclr", "parallel.mode=ddp"), 4)
    # of two views: the embeddings, and what is scattered are the gradients of those gathered
    assert found.collectives["all-gather"] == found.collectives["reduce-scatter"] == 2 * 16 * 32 * 4


@pytest.mark.slow
def test_rows_of_a_queue_are_gathered_once_a_step():
    """Those of all micro-batches together, whose number the trace reduces. The features are gathered in forward, for
    the logs."""
    common = ["data.batch=32", "parallel.mode=ddp", "objective.head_outputs=16", "model.depth=1"]
    found = [
        plan.trace(tiny("moco", *common, f"parallel.micro_batch={micro}"), 2).collectives["all-gather"]
        for micro in (16, 4, 2)
    ]
    assert found == [4 * 32 * (16 + 32)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(NAMES, "mae", "dinov3", "gpt", "moco"))
def test_traffic_is_that_of_the_engine(name: str, shards: Path, monkeypatch: pytest.MonkeyPatch):
    """Compared with the collectives that the real FSDP2 engine calls in a step, and those of `after_step`, without
    memory and without other processes."""
    cfg = tiny(name, "parallel.mode=fsdp2", *["model.depth=1"] * (name == "dinov3"), shards=shards)
    planned = plan.trace(cfg, 2).collectives
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        fsdp2, "_broadcasts_weights", lambda recipe: False
    )  # weights come from a process 0 once, which is not there
    seen = trace._Real()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with trace._trace_environment(2), FakeTensorMode(allow_non_fake_inputs=True), seen:
            engine = fsdp2.FSDP2(build_objective(cfg), cfg, torch.device("cpu"))
            batch = trace.example(cfg, engine.objective, 8)
            with engine.microbatch(last=True):
                engine.backward(engine.forward(batch, 0)[0])
            engine.objective.after_step(0)
    finally:
        dist.destroy_process_group()
    assert planned.keys() == seen.collectives.keys()
    for key, size in seen.collectives.items():
        assert planned[key] == pytest.approx(size, rel=0.1), key  # pieces are padded; some units are fetched twice


# ---------------------------------------------------------------- the command
@pytest.mark.slow
def test_output(tmp_path: Path):
    """Options and overrides may come in any order; no data are read, and nothing is written."""
    done = unlabeled(
        "plan", "mae_vits16", "--processes", "4", "parallel.mode=fsdp2", "data.train=/nowhere", "parallel.micro_batch=null",
        "model.depth=2", "objective.decoder_depth=1",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert done.stdout.startswith("mae on vit_small, bf16, fsdp2 on 4 × h100")
    assert lines["parameters"].startswith("7.6 M trained")
    assert "1024 images, 256 per process; 5.86 TFLOP" in lines["a"]
    assert "at 40% of 4 × 989 TFLOP/s" in lines["time"]
    rate = float(lines["data"].removesuffix(" images per second for each process").replace(",", ""))
    assert rate == pytest.approx(256 / (5.86e12 / 4 / (0.4 * 989e12)), rel=0.01)
    for word in ("parameters 7.24 MiB", "optimizer 14.5 MiB", "activations", "gathered"):
        assert word in lines["memory"]
    assert "all-gather 29.1 MiB, reduce-scatter 29 MiB" in lines["traffic"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "h1000"], "--device h1000: not known; known: b200, h200"),
        (["--mfu", "40"], "--mfu 40: write a share of the peak, such as 0.4"),
        (["--mfu", "0"], "--mfu 0: write a share"),
        (["--processes", "0"], "--processes 0: write 1 or more"),
        (["--processes", "2"], "parallel.mode = single is one process, not 2; write parallel.mode=ddp, fsdp2"),
        (
            ["--processes", "3", "parallel.mode=ddp"],
            "data.batch = 128: 3 processes do not divide it; write data.batch=129",
        ),
        (["parallel.mode=ddp", "parallel.replicate=2"], "only fsdp2 has replicas; parallel.mode is ddp"),
        (
            ["--processes", "4", "parallel.mode=fsdp2", "parallel.replicate=3"],
            "parallel.replicate = 3: 4 processes do not divide into so many replicas",
        ),
        (["parallel.offload=true"], "parallel.offload = true: single keeps everything on the device"),
        (["--device", "v100", "precision=bf16"], "--device v100: has no bf16; write precision=fp32"),
        (["parallel.micro_batch=48"], "parallel.micro_batch = 48: data.batch = 128"),
        (["parallel.mode=fsdp"], "parallel.mode = 'fsdp': expected one of single, ddp, fsdp2"),
    ],
)
def test_errors(args: list[str], says: str):
    done = unlabeled("plan", "demo", *args)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_batch_norms_are_not_accumulated():
    with pytest.raises(ConfigError, match=r"the loss of dino couples .* \(by the method, or by batch norms\)"):
        plan.trace(tiny("dino", "model=resnet_micro", "parallel.micro_batch=4"))
    plan.trace(tiny("dino", "parallel.micro_batch=4", "model.depth=1"))


@pytest.mark.slow
def test_errors_come_at_once():
    for args in (("plan", "--help"), ("plan", "demo", "--device", "h1000"), ("plan", "demo", "--processes", "2")):
        assert startup_ratio(*args) < 3.5, args


def test_an_objective_that_needs_values_is_named(tmp_path: Path):
    path = tmp_path / "picky.py"
    text = (ROOT / "pretrain" / "objectives" / "simclr.py").read_text()
    path.write_text(text.replace("        z = self.head(features)", "        features = features[features[:, 0] > 0]\n        z = self.head(features)"))  # fmt: skip
    with pytest.raises(ConfigError, match=r"picky.py: cannot be planned without data .* its shapes depend on"):
        plan.trace(tiny(str(path)), 1)


@pytest.mark.slow
def test_a_plan_leaves_no_trace():
    """A plan also runs inside trainings: random states, process groups and patched functions are restored."""
    state, draw = torch.get_rng_state(), torch.nn.init.normal_
    plan.trace(tiny("simclr", "parallel.mode=ddp"), 2)
    assert torch.equal(torch.get_rng_state(), state) and torch.nn.init.normal_ is draw
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.matrix
def test_seven_billion_parameters_on_a_laptop():
    code = "import resource, sys; from launch.cli import main; main();"
    code += "usage = resource.getrusage(resource.RUSAGE_SELF); print(usage.ru_maxrss / 2**20, usage.ru_utime + usage.ru_stime)"
    size = ["model=vit", "model.dim=4096", "model.depth=40", "model.heads=32", "data.batch=2048"]
    spread = ["parallel.mode=fsdp2", "parallel.recompute=full", "--processes", "256"]
    command = [sys.executable, "-c", code, "plan", "dinov2_vits16", *size, *spread]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    gigabytes, seconds = map(float, done.stdout.splitlines()[-1].split())
    assert "8093.8 M trained, 8093.8 M of a teacher" in done.stdout
    assert gigabytes < 3 and seconds < 120
