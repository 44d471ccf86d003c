"""Every objective trains the same way in every mode: losses, gradient norms and weights of one process, on two and four."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch.local import environments, wait
from pretrain import objective
from tests.conftest import teacher, tokens
from tests.parallel.modes import LR

MODES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("single", 1, {}),
    "ddp2": ("ddp", 2, {}),
    "fsdp2": ("fsdp2", 2, {}),
    "fsdp2-alone": ("fsdp2", 1, {}),
    "hsdp2x2": ("fsdp2", 4, {"parallel.replicate": 2}),
    "zero1": ("zero1", 2, {}),
    "zero2": ("zero2", 2, {}),
    "zero3": ("zero3", 2, {}),
    "recompute": ("fsdp2", 2, {"parallel.recompute": "full"}),
    "selective": ("ddp", 2, {"parallel.recompute": "selective"}),
    "fsdp2-offload": ("fsdp2", 2, {"parallel.offload": True}),
    "zero2-offload": ("zero2", 2, {"parallel.offload": True}),
    "single-bf16": ("single", 1, {"precision": "bf16"}),
    "ddp2-bf16": ("ddp", 2, {"precision": "bf16"}),
    "fsdp2-bf16": ("fsdp2", 2, {"precision": "bf16"}),
    "zero2-bf16": ("zero2", 2, {"precision": "bf16"}),
    "zero3-bf16": ("zero3", 2, {"precision": "bf16"}),
}


def run(mode: str, shards: Path, folder: Path, **more: Any) -> list[dict[str, Any]]:
    """What each process found, in rank order."""
    name, count, options = MODES[mode]
    for make in (teacher, tokens):  # before several processes look for them
        make(shards.parent)
    job = folder / "job.yaml"
    given = {"shards": str(shards), "mode": name, "options": options | more.pop("options", {}), "target": str(folder)}
    job.write_text(yaml.safe_dump(given | more))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.modes", str(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        for environment in environments(count)
    ]
    assert wait(started) == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory):
    """{mode: what its processes found}; each mode is started once for all objectives."""
    known: dict[str, list[dict[str, Any]]] = {}

    def get(mode: str) -> list[dict[str, Any]]:
        if mode not in known:
            known[mode] = run(mode, shards, tmp_path_factory.mktemp(mode))
        return known[mode]

    return get


def close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, weights: float, logs: float = 0.0) -> None:
    for key, allowed in (("loss", tolerance), ("norm", tolerance), ("logs", logs or tolerance)):
        torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=allowed, atol=allowed / 10)
    assert ours["weights"].keys() == theirs["weights"].keys()
    name, away = max(distances(ours, theirs).items(), key=lambda item: item[1])
    assert away < weights, f"{name}: {away}"


def distances(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """How far each weight is from the other run's, relative to its size; one without a gradient is not moved but by rounding."""
    out = {}
    for name in ours["weights"]:
        value, other = ours["weights"][name].double(), theirs["weights"][name].double()
        out[name] = float((value - other).norm() / (other.norm() + LR * other.numel() ** 0.5))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", objective.names())
@pytest.mark.parametrize("mode", [m for m in MODES if "bf16" not in m and m != "single"])
def test_the_same_in_every_mode(mode: str, name: str, found):
    """To 1e-5; SimCLR, whose batch norm divides almost equal features by their spread, under selective recomputation, which takes other operations, to 2e-5."""
    alone = found("single")[0][name]
    tolerance = 2e-5 if (mode, name) == ("selective", "simclr") else 1e-5
    for process in found(mode):
        close(process[name], alone, tolerance, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", objective.names())
@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_is_not_finite_on_one_process_changes_nothing_on_any(mode: str, name: str, found):
    """Weights, buffers, teacher and optimizer state are bit-equal before and after that step; the one after it trains again."""
    for process in found(mode):
        assert process[name]["skipped"] == 1.0 and not process[name]["changed"] and not process[name]["stuck"]


@pytest.mark.slow
@pytest.mark.parametrize("name", objective.names())
@pytest.mark.parametrize("mode", [m for m in MODES if "bf16" in m and m != "single-bf16"])
def test_bf16_is_the_same_within_its_rounding(mode: str, name: str, found):
    """To 1 % over all steps; weights to 5 %, or to twice as far as one process in bf16 is away from itself in fp32; what is only logged to 2 %, as KoLeo's
    distances between the features of an untrained network are a fifth of these, and so is what their rounding is of them. Not SimCLR: the batch norm of its
    head divides the almost equal features of an untrained network by their small spread, and their rounding with it, so two runs in bf16 part at the
    first update; there, loss and gradient norm agree to 5 %."""
    alone = found("single-bf16")[0][name]
    rounding = max(distances(alone, found("single")[0][name]).values())
    for process in found(mode):
        if name == "simclr":
            for key in ("loss", "norm"):
                assert process[name][key][0] == pytest.approx(alone[key][0], rel=5e-2)
        else:
            close(process[name], alone, 1e-2, max(5e-2, 2 * rounding), logs=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp2", "fsdp2", "hsdp2x2"])
def test_muon_is_the_same_in_every_mode(mode: str, shards: Path, tmp_path: Path):
    """Among 4 processes a ViT's matrices are cut unevenly; a step that is not finite leaves its momentum bit-equal, too."""
    muon = {"options": {"optim.name": "muon"}, "objectives": ["mae"]}
    found = {}
    for name in ("single", mode):
        (tmp_path / name).mkdir()
        found[name] = [process["mae"] for process in run(name, shards, tmp_path / name, **muon)]
    for process in found[mode]:
        close(process, found["single"][0], 1e-5, 1e-5)
        assert process["skipped"] == 1.0 and not process["changed"] and not process["stuck"]
