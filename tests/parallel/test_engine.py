"""What an engine refuses, fp16 and its loss scale, compiled blocks, teachers that are not cut, and where recomputation saves memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from launch.local import environments, wait
from pretrain import objective, plan
from pretrain.config import ConfigError
from pretrain.models import fused
from pretrain.objectives.mae import MAE
from pretrain.parallel import engine as engines
from pretrain.parallel.scale import INITIAL
from pretrain.train import build_objective
from pretrain.train import train as run_training
from tests.conftest import tiny_recipe
from tests.parallel.modes import ACCUMULATE, STEPS, batches, everything, poisoned, recipe_of, train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.replicate=2", "parallel.mode=ddp"], "only fsdp2 has replicas"),
        (["parallel.offload=true"], "single keeps everything on the device"),
        (["parallel.frozen=replicated"], "single cuts no parameters"),
        (["parallel.frozen=replicated", "parallel.mode=zero3"], "zero3 cuts all parameters"),
        (["parallel.mode=zero1", "precision=fp16"], "zero1 has fp32 and bf16"),
        (["parallel.micro_batch=3"], "does not divide into it"),
        (["model=resnet_micro", "parallel.recompute=full"], "batch norms would count every batch twice"),
    ],
)
def test_refuses(overrides: list[str], message: str, shards: Path, tmp_path: Path):
    name = "simclr" if any("resnet" in text for text in overrides) else "mae"
    cfg = tiny_recipe(name, shards, tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        engines.build(build_objective(cfg), cfg, CPU)


def test_zero_without_deepspeed_names_the_extra(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    cfg = tiny_recipe("mae", shards, tmp_path, "parallel.mode=zero2")
    with pytest.raises(ConfigError, match=r"pip install 'unlabeled\[deepspeed\]'"):
        engines.build(build_objective(cfg), cfg, CPU)


def test_fp16_scales_its_loss(shards: Path):
    """Close to fp32, with weights in fp32; a step that overflows halves the factor and changes nothing else."""
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

    engine = engines.build(build_objective(cfg), cfg, CPU)
    assert engine.scale.factor.item() == INITIAL
    for expected in (INITIAL / 2, INITIAL / 4):
        before = everything(engine)
        for _ in range(ACCUMULATE):
            engine.backward(engine.forward(poisoned(data[0]), 0)[0])
        engine.step(1e-3, 0.0, lambda norm: 1.0 - norm.isfinite().float())
        assert engine.scale.factor.item() == expected
        assert all(torch.equal(v, before[k]) for k, v in everything(engine).items() if "scale" not in k)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_blocks_give_the_same(recompute: str, shards: Path):
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


def test_full_recomputation_keeps_less(shards: Path):
    """Bytes that autograd holds between forward and backward."""

    def held(recompute: str) -> int:
        cfg = recipe_of("mae", shards, "single", {"model.depth": 6, "parallel.recompute": recompute})
        engine = engines.build(build_objective(cfg), cfg, CPU)
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
        engine = engines.build(build_objective(cfg), cfg, CPU)
        with FlopCounterMode(display=False) as counter, fused.switched_off():  # as selective recomputation does
            engine.backward(engine.forward(batches(cfg, shards, 1)[0], 0)[0])
        return counter.get_total_flops()

    assert flops("selective") == flops("none") < flops("full")


class Guided(MAE):
    """A MAE that also follows a frozen network which never moves."""

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
from pretrain.models import presets
from pretrain.parallel import engine as engines, processes
from tests.parallel.modes import batches, mine, recipe_of
from tests.parallel.test_engine import Guided
device = processes.start("fsdp2", torch.device("cpu"))
losses = []
for frozen in ("sharded", "replicated"):
    cfg = recipe_of("mae", Path(sys.argv[1]), "fsdp2", {"parallel.frozen": frozen})
    data = batches(cfg, Path(sys.argv[1]), 4)
    torch.manual_seed(0)
    model = Guided(cfg.objective, lambda **changes: presets.build(cfg.model, **changes))
    engine = engines.build(model, cfg, device)
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


POSITIONS = {"gpt": ["learned", "rope"], "bert": [""], "t5": [""]}  # "": the model has one kind


@pytest.mark.parametrize(
    ("name", "positions"),
    [(name, kind) for name in objective.names() for kind in POSITIONS.get(name, ["learned", "sincos", "rope"])],
)
def test_an_objective_can_be_built_without_memory(name: str, positions: str, shards: Path, tmp_path: Path):
    cfg = tiny_recipe(name, shards, tmp_path, *([f"model.positions={positions}"] if positions else []))
    empty, real = (build_objective(cfg, empty=empty).state_dict() for empty in (True, False))
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in real.items()}
    assert all(value.is_meta for value in empty.values())


def test_flops_per_second_are_those_of_the_plan(shards: Path, tmp_path: Path):
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "log.flops=true", "steps=4", "log.every=4", "device=cpu")
    last = json.loads((run_training(cfg) / "metrics.jsonl").read_text().splitlines()[-1])
    steps_per_second = last["samples_per_second"] / cfg.data.batch
    assert last["flops_per_second"] == pytest.approx(plan.trace(cfg).flops * steps_per_second, rel=0.01)
    assert 0 < last["mfu"] < 1 and last["memory_gb"] > 0.05
