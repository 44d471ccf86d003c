"""Steps of every objective on one GPU: no host syncs, the same numbers as on a CPU, and the allowed differences for
precision, recomputation, compilation, attention and accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.estimate import plan
from pretrain.objectives import finder
from tests.gpu.conftest import no_syncs
from tests.gpu.steps import data_of, engine_of, losses_of
from tests.parallel.modes import ACCUMULATE, one_step

NAMES = finder.names()
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_steps_two_to_five_do_not_wait_for_the_device(name: str, device: torch.device, shards: Path):
    """The first step may create constants and choose kernels. Unlike fake tensors, `set_sync_debug_mode("error")`
    also sees waits inside kernels."""
    engine, guard = engine_of(name, shards, device)
    data = data_of(name, shards, device, 6)
    losses = [one_step(engine, guard, data[step * ACCUMULATE :], step)[0] for step in range(2)]
    with no_syncs(device):
        for step in range(2, 6):
            losses.append(one_step(engine, guard, data[step * ACCUMULATE :], step)[0])
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_device_computes_what_the_cpu_does(name: str, device: torch.device, shards: Path):
    """In fp32 without TF32; only the order of sums differs."""
    found, expected = (losses_of(name, shards, where) for where in (device, CPU))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mae", "dinov3", "gpt"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(name: str, precision: str, device: torch.device, shards: Path):
    found, expected = (losses_of(name, shards, device, precision=each) for each in (precision, "fp32"))
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=5e-2, atol=0)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_number(recompute: str, device: torch.device, shards: Path):
    found = losses_of("mae", shards, device, parallel__recompute=recompute)
    torch.testing.assert_close(found, losses_of("mae", shards, device), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3", "gpt"])
def test_compiled_blocks_give_the_same(name: str, device: torch.device, shards: Path):
    torch._dynamo.reset()
    counters.clear()
    found = losses_of(name, shards, device, parallel__compile=True)
    graphs = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(found, losses_of(name, shards, device), rtol=1e-3, atol=1e-4)
    assert graphs <= 4 or device.type == "cuda"  # there kernels are compiled, too, and xformers breaks a block in two


def test_two_runs_are_alike(device: torch.device, shards: Path):
    """They are not bit-equal: atomic additions on a GPU happen in any order."""
    first, second = (losses_of("dinov3", shards, device) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mae", "gpt"])
def test_the_plan_knows_the_peak_of_memory(name: str, device: torch.device, shards: Path):
    """Within 15 %, at sizes at which the allocator's blocks of 2 MiB do not matter. A CPU has no such counter."""
    wide = {"model__dim": 512, "model__depth": 6, "model__heads": 8} if device.type == "cuda" else {}
    engine, guard = engine_of(name, shards, device, **wide)
    planned = plan.trace(engine.recipe.replace(device=device.type), 1)
    assert planned.peak > 16 * planned.trained
    data = data_of(name, shards, device, 3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(3):
        one_step(engine, guard, data[step * ACCUMULATE :], step)
    if device.type == "cuda":
        assert planned.peak == pytest.approx(torch.cuda.max_memory_allocated(device), rel=0.15)
