"""Errors of an engine, fp16 and its loss scale, compiled blocks, teachers that are not sharded, and the memory that
recomputation saves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import ConfigError
from launch.local import environments, wait
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.estimate import hardware, plan
from pretrain.models import presets
from pretrain.objectives import finder
from pretrain.objectives.mae import MAE
from pretrain.parallel import blocks, processes, timeouts
from pretrain.parallel.blocks import blocks_of
from pretrain.parallel.device import set_tf32
from pretrain.parallel.loss_scale import INITIAL_FACTOR
from pretrain.parallel.modes import build_engine
from pretrain.run_folder.recipe_file import write_recipe
from pretrain.run_startup import flops_and_peak
from pretrain.train import train as run_training
from tests.conftest import sampled, tiny_recipe
from tests.parallel.modes import ACCUMULATE, STEPS, batches, everything, poisoned, recipe_of, train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.replicate=2", "parallel.mode=ddp"], "only fsdp2 has replicas"),
        (["parallel.offload=true"], "single keeps everything on the device"),
        (["parallel.frozen=replicated"], "single shards no parameters"),
        (["parallel.frozen=replicated", "parallel.mode=zero3"], "zero3 shards all parameters"),
        (["parallel.mode=zero1", "precision=fp16"], "zero1 has fp32 and bf16"),
        (["parallel.micro_batch=3"], "does not divide into micro-batches"),
        (["model=resnet_micro", "parallel.recompute=full"], "batch norms would count every batch twice"),
    ],
)
def test_refuses(overrides: list[str], message: str, shards: Path, tmp_path: Path):
    name = "simclr" if any("resnet" in text for text in overrides) else "mae"
    cfg = tiny_recipe(name, shards, tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        build_engine(build_objective(cfg), cfg, CPU)


def test_batch_norms_couple_a_batch(shards: Path, tmp_path: Path):
    """A method whose loss does not couple samples cannot accumulate gradients if its network does."""
    cfg = tiny_recipe("dino", shards, tmp_path, "model=resnet_micro", "parallel.micro_batch=4")
    objective = build_objective(cfg)
    for build in (lambda: build_engine(objective, cfg, CPU), lambda: build_stream(cfg, objective, open_samples(cfg))):
        with pytest.raises(
            ConfigError, match=r"or by batch norms\), so 4 micro-batches are not equal to one batch of 16"
        ):
            build()


def test_zero_without_deepspeed_names_the_extra(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    cfg = tiny_recipe("mae", shards, tmp_path, "parallel.mode=zero2")
    with pytest.raises(ConfigError, match=r"pip install 'unlabeled\[deepspeed\]'"):
        build_engine(build_objective(cfg), cfg, CPU)


def test_fp16_scales_its_loss(shards: Path):
    """Losses are close to fp32, with weights in fp32; a step that overflows halves the factor and changes nothing
    else."""
    cfg = recipe_of("mae", shards, "single", {"precision": "fp16"})
    data = batches(cfg, shards, STEPS * ACCUMULATE)
    plain = train(recipe_of("mae", shards, "single", {}), data, CPU)
    half = train(cfg, data, CPU)
    torch.testing.assert_close(half["loss"], plain["loss"], rtol=2e-3, atol=0)
    torch.testing.assert_close(half["norm"], plain["norm"], rtol=2e-2, atol=0)
    assert (
        all(w.dtype == torch.float32 for w in half["weights"].values())
        and half["skipped"] == 1.0
        and not half["changed"]
    )

    engine = build_engine(build_objective(cfg), cfg, CPU)
    assert engine.scale.factor.item() == INITIAL_FACTOR
    for expected in (INITIAL_FACTOR / 2, INITIAL_FACTOR / 4):
        before = everything(engine)
        for _ in range(ACCUMULATE):
            engine.backward(engine.forward(poisoned(data[0]), 0)[0])
        engine.step(1e-3, 0.0, lambda norm: 1.0 - norm.isfinite().float())
        assert engine.scale.factor.item() == expected
        assert all(torch.equal(v, before[k]) for k, v in everything(engine).items() if "scale" not in k)
    engine.scale.undo()
    assert engine.scale.factor.item() == INITIAL_FACTOR / 2


COMPILED = [(how, backend) for how in ("none", "full", "selective") for backend in ("aot_eager", "inductor")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", sampled(COMPILED, ("none", "aot_eager"), ("full", "aot_eager"), ("selective", "inductor")), ids=str
)
def test_compiled_blocks_give_the_same(case: tuple[str, str], shards: Path, monkeypatch: pytest.MonkeyPatch):
    """With the backend of a run, which compiles for a minute, and with one that runs the same graphs without it."""
    recompute, backend = case
    monkeypatch.setattr(blocks, "BACKEND", backend)
    data = batches(recipe_of("simclr", shards, "single", {}), shards, STEPS * ACCUMULATE)
    plain = train(recipe_of("simclr", shards, "single", {}), data, CPU)
    torch._dynamo.reset()
    counters.clear()
    options = {"parallel.compile": True, "parallel.recompute": recompute}
    compiled = train(recipe_of("simclr", shards, "single", options), data, CPU)
    for key in ("loss", "norm"):
        torch.testing.assert_close(compiled[key], plain[key], rtol=1e-4, atol=0)
    assert plain["weights"].keys() == compiled["weights"].keys()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # one for all blocks


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinov3", {"model.positions": "rope", "model.layer_scale": 0.1}),
        ("mae", {"model.positions": "learned", "model.layer_scale": 0.1, "model.drop_path": 0.5}),
        ("gpt", {}),
        ("bert", {}),
        ("t5", {}),
    ],
)
def test_the_residual_stream_has_one_dtype(name: str, options: dict[str, object], precision: str, shards: Path):
    """Every block gets the compute dtype, and so needs the same memory, in every mode, although only FSDP2 gathers
    scales and tables in this dtype."""
    expected = {torch.bfloat16 if precision == "bf16" else torch.float32}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for mode in ("single", "ddp", "fsdp2"):
            cfg = recipe_of(name, shards, mode, {**options, "precision": precision})
            engine = build_engine(build_objective(cfg), cfg, CPU)
            found: list[torch.dtype] = []
            for block in blocks_of(engine.objective):
                block.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0].dtype))
            engine.forward(batches(cfg, shards, 1)[0], 0)
            assert set(found) == expected, mode
    finally:
        dist.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group that has only this process."""
    processes.start("ddp", CPU)
    yield
    processes.stop()


def test_gradients_of_ddp_are_views_of_its_buckets(alone: None, shards: Path):
    cfg = recipe_of("mae", shards, "ddp", {})
    engine = build_engine(build_objective(cfg), cfg, CPU)
    for batch in batches(cfg, shards, ACCUMULATE):
        engine.backward(engine.forward(batch, 0)[0])
    storages = {p.grad.untyped_storage().data_ptr() for p in engine.parameters}
    assert len(storages) < len(engine.parameters) / 4


@pytest.mark.slow
def test_ddp_does_not_cut_the_graphs_of_blocks(alone: None, shards: Path, monkeypatch: pytest.MonkeyPatch):
    """DDP would cut them at its buckets, of which the first has 1 MB; a block here has 3 MB."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(blocks, "BACKEND", backend)
    torch._dynamo.reset()
    cfg = recipe_of("simclr", shards, "ddp", {"parallel.compile": True, "model.dim": 256, "model.depth": 1})
    engine = build_engine(build_objective(cfg), cfg, CPU)
    (batch,) = batches(cfg, shards, 1)
    engine.backward(engine.forward(batch, 0)[0])
    assert len(graphs) == 1


def test_trained_roots_stay_gathered_until_their_backward(alone: None, shards: Path):
    """The roots of student and teacher; without a backward (validation, pictures) no unit stays gathered."""
    cfg = recipe_of("dinov2", shards, "fsdp2", {})
    engine = build_engine(build_objective(cfg), cfg, CPU)
    model, (batch,) = engine.objective, batches(cfg, shards, 1)

    def sharded() -> dict[str, bool]:
        roots = {"student": model.student["backbone"].cls_token, "teacher": model.teacher["backbone"].cls_token}
        block = model.student["backbone"].blocks[0].norm1.weight
        return {name: isinstance(p, DTensor) for name, p in {**roots, "block": block}.items()}

    loss, _ = engine.forward(batch, 0)
    assert sharded() == {"student": False, "teacher": True, "block": True}
    engine.backward(loss)
    assert all(sharded().values())
    engine.validate([batch], 0)
    assert all(sharded().values())
    engine.pictures(batch)
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tf32_is_for_runs_that_are_not_in_fp32(precision: str, shards: Path):
    set_tf32(precision == "fp32")
    cfg = recipe_of("mae", shards, "single", {"precision": precision})
    build_engine(build_objective(cfg), cfg, CPU)
    allowed = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    assert allowed == [precision != "fp32"] * 2


@pytest.mark.slow
def test_graphs_are_as_many_as_networks_not_as_sizes(shards: Path, monkeypatch: pytest.MonkeyPatch):
    """DINOv3's high-resolution stage: student, teacher and Gram teacher, and five rows of crop sizes."""
    monkeypatch.setattr(blocks, "BACKEND", "eager")
    rows = [(32, 16, 48), (48, 16, 64), (48, 24, 64), (64, 24, 96), (64, 32, 96)]  # global, local, Gram pixels
    torch._dynamo.reset()
    counters.clear()
    said: list[str] = []
    log = blocks.GraphLog(said.append)
    cfg = recipe_of("dinov3", shards, "single", {"parallel.compile": True, "objective.gram_size": 64})
    # torch's own way to change an option: monkeypatch would delete it when it puts it back
    with torch._dynamo.config.patch(recompile_limit=8):
        engine = build_engine(build_objective(cfg), cfg, CPU)
        for step, (glob, local, gram) in enumerate(rows):
            sizes = {"objective.local_size": local, "model.image_size": glob, "objective.gram_size": gram}
            (batch,) = batches(recipe_of("dinov3", shards, "single", sizes), shards, 1)
            engine.backward(engine.forward(batch, step)[0])
            log(step)
        assert torch._dynamo.config.recompile_limit == 24
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 6
    assert len(said) <= 2 and said[0].startswith("step 0: torch.compile made")


def test_full_recomputation_keeps_less(shards: Path):
    """Compares the bytes that autograd keeps between forward and backward."""

    def held(recompute: str) -> int:
        cfg = recipe_of("mae", shards, "single", {"model.depth": 6, "parallel.recompute": recompute})
        engine = build_engine(build_objective(cfg), cfg, CPU)
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        own = {p.untyped_storage().data_ptr() for p in engine.objective.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            engine.forward(batches(cfg, shards, 1)[0], 0)
        return sum(size for where, size in sizes.items() if where not in own)

    assert held("full") < 0.6 * held("none")


def test_selective_recomputation_repeats_no_matrix_product(shards: Path):
    def flops(recompute: str) -> int:
        cfg = recipe_of("mae", shards, "single", {"parallel.recompute": recompute})
        engine = build_engine(build_objective(cfg), cfg, CPU)
        with FlopCounterMode(display=False) as counter:
            engine.backward(engine.forward(batches(cfg, shards, 1)[0], 0)[0])
        return counter.get_total_flops()

    assert flops("selective") == flops("none") < flops("full")


class Guided(MAE):
    """A MAE that is also trained towards a frozen network."""

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        self.frozen = nn.ModuleDict({"backbone": backbone()}).requires_grad_(False)

    def forward(self, batch, step):
        loss, logs = super().forward(batch, step)
        with torch.no_grad():
            target = self.frozen["backbone"](batch["image"]).cls
        return loss + (self.backbone(batch["image"]).cls - target).square().mean(), logs


SCRIPT = """
import sys, torch
from pathlib import Path
from torch.distributed.tensor import DTensor
from pretrain.models.build import build_model
from pretrain.parallel import processes
from pretrain.parallel.modes import build_engine
from tests.parallel.modes import batches, mine, recipe_of
from tests.parallel.test_engine import Guided
device = torch.device("cpu")
processes.start("fsdp2", device)
losses = []
for frozen in ("sharded", "replicated"):
    cfg = recipe_of("mae", Path(sys.argv[1]), "fsdp2", {"parallel.frozen": frozen})
    data = batches(cfg, Path(sys.argv[1]), 4)
    torch.manual_seed(0)
    model = Guided(cfg.objective, lambda **changes: build_model(cfg.model, **changes))
    engine = build_engine(model, cfg, device)
    cut = {isinstance(p, DTensor) for p in model.frozen.parameters()}
    assert cut == {frozen == "sharded"}, cut
    assert all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
    for step in range(2):
        for batch in data[2 * step : 2 * step + 2]:
            loss, _ = engine.forward(mine(batch), step)
            engine.backward(loss)
        losses.append((float(processes.mean(loss.detach())), float(engine.step(1e-3, 0.0))))
    assert engine.state_dict()["model"].keys() == model.state_dict().keys()
assert losses[:2] == losses[2:], losses
processes.stop()
"""


@pytest.mark.slow
def test_a_frozen_network_is_cut_or_not(shards: Path):
    command = [sys.executable, "-c", SCRIPT, str(shards)]
    assert (
        wait([subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **e}) for e in environments(2)]) == 0
    )


def kinds_of_positions(name: str) -> tuple[str, ...]:
    """The values of `model.positions` for the model with which tests train an objective; "" if it has one kind."""
    family = presets.choose(finder.config_class(name)[0].tiny()[0].get("model", "vit"))[0]
    return get_args(get_type_hints(family).get("positions")) or ("",)


@pytest.mark.parametrize(
    ("name", "positions"), [(name, kind) for name in finder.names() for kind in kinds_of_positions(name)]
)
def test_an_objective_can_be_built_without_memory(name: str, positions: str, shards: Path, tmp_path: Path):
    cfg = tiny_recipe(name, shards, tmp_path, *([f"model.positions={positions}"] if positions else []))
    empty, real = (build_objective(cfg, empty=empty).state_dict() for empty in (True, False))
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
    assert all(value.is_meta for value in empty.values())


@pytest.mark.slow
def test_flops_per_second_are_those_of_the_plan(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "log.flops=true", "steps=4", "log.every=4", "device=cpu")
    last = json.loads((run_training(cfg) / "metrics.jsonl").read_text().splitlines()[-1])
    steps_per_second = last["samples_per_second"] / cfg.data.batch
    assert last["flops_per_second"] == pytest.approx(plan.trace(cfg).flops * steps_per_second, rel=0.01)
    assert 0 < last["mfu"] < 1 and last["memory_gb"] > 0.05
    said = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"mfu is relative to \S+ TFLOP/s per process, measured on this cpu with a fp32 product of", said)


@pytest.mark.slow
def test_flops_are_traced_once_and_on_rank_0_only(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg, traced, trace = tiny_recipe("mae", shards, tmp_path, "log.flops=true"), [], plan.trace
    monkeypatch.setattr(plan, "trace", lambda cfg: traced.append(cfg.data.batch) or trace(cfg))
    asked: list[object] = []
    monkeypatch.setattr(processes, "on_rank_0", lambda ask: asked.append(ask) or (1.0, 2.0))
    assert flops_and_peak(cfg, tmp_path, None, print) == (1.0, 2.0) and not traced  # type: ignore[arg-type]
    assert len(asked) == 1  # where an error of any kind is raised on every rank
    write_recipe(cfg, tmp_path)
    assert plan.step_flops(cfg, tmp_path) == plan.step_flops(cfg, tmp_path) and traced == [16]
    other = cfg.replace(data=cfg.data.replace(batch=8))
    write_recipe(other, tmp_path)
    assert 2 * plan.step_flops(other, tmp_path) == trace(cfg).flops and traced == [16, 8]


def test_peaks_of_devices_with_similar_names():
    """Names as torch.cuda.get_device_name returns them; figures of the data sheets, without sparsity."""
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA H200")
    assert [hardware.peak_of(name, "bf16") for name in names] == [989e12, 835e12, 756e12, 989e12]
    assert hardware.peak_of("NVIDIA GH200 480GB", "bf16") is None


def test_process_groups_that_are_destroyed_are_forgotten():
    for _ in range(2):
        processes.start("ddp", CPU)
        assert len(timeouts._patient) == 1
        processes.stop()
    assert not timeouts._patient


def test_the_peak_of_an_unknown_device_is_measured_with_several_products():
    rate, size = hardware.measured(CPU, "fp32", (64, 256))
    assert size in (64, 256) and rate > 0
    assert max(hardware.SIZES) >= 8192 and len(hardware.SIZES) > 1 and len(hardware.CPU_SIZES) > 1
