"""What a rank does before the first step, in order: it chooses its device and its precision, and gets its weights."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from common import config
from common.errors import ConfigError, run_main
from launch.local import environments, wait
from pretrain import image_folders, run_startup
from pretrain import train as training
from pretrain.parallel import processes, timeouts
from pretrain.parallel.device import pick_device
from pretrain.recipes import parallel_checks, recipe
from tests.conftest import tiny_recipe
from tests.forked import Forked


def test_time_outs_fit_each_other(shards: Path, tmp_path: Path):
    """Ranks wait longer for each other than one of them waits for its store, and stacks are written before they end."""
    local = tiny_recipe("mae", shards, tmp_path)
    remote = tiny_recipe("mae", shards, tmp_path, "data.train=s3://bucket/shards")
    mixed = tiny_recipe("mae", shards, tmp_path, "data.train=[]", f"data.mix=[{shards},'s3://bucket/shards']")
    assert [parallel_checks.collective_timeout(cfg) for cfg in (local, remote, mixed)] == [300, 900, 900]
    slow = tiny_recipe("mae", shards, tmp_path, "data.fetch.stall_seconds=1000")
    assert [parallel_checks.stall_seconds(cfg, 2) for cfg in (local, remote, slow)] == [120, 120, 150]
    assert parallel_checks.stall_seconds(slow, 1) == 1000
    before = timeouts.long()
    try:
        timeouts.set_long(3600.0)
        assert timeouts.long() == timedelta(hours=2)
        timeouts.set_long(600.0)
        assert timeouts.long() == timeouts.FIRST
    finally:
        timeouts._long = before


class Reached(Exception):
    """Raised when the run has come as far as the test needs."""


class Allocations(TorchFunctionMode):
    """Records the CUDA devices that tensors are created on."""

    def __init__(self, found: list[tuple[str, torch.device]]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cuda":
            self.found.append(("allocation", out.device))
        return out


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """A machine whose eight GPUs exist for fake tensors only. Returns the recorded calls: the device that becomes
    current, and allocations."""
    found: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("current", torch.device(device))))
    return found


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_rank_touches_no_gpu_but_its_own(
    device: str, eight_gpus: list, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An allocation on `cuda` before the rank's device is set would create a context on GPU 0."""
    for key, value in environments(4)[3].items():
        monkeypatch.setenv(key, value)
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "parallel.mode=ddp", f"device={device}")

    def start(mode: str, own: torch.device, **_: float) -> torch.device:
        assert own == torch.device("cuda", 3)
        raise Reached

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(processes, "on_every_rank", lambda ask: ask())  # the other three are not there
    with FakeTensorMode(), Allocations(eight_gpus), pytest.raises(Reached):
        training._train_only(cfg)
    own = torch.device("cuda", 3)
    assert eight_gpus[0] == ("current", own) and {where for _, where in eight_gpus} == {own}


def test_a_rank_without_a_gpu_is_refused(eight_gpus: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(ConfigError, match=r"process 8 of this machine .* 8 can be seen; start 8 processes"):
        pick_device("cuda", "fsdp2")
    assert not eight_gpus


def fail_on_rank_1(path: str, where: str) -> int:
    """One rank of a run in which rank 1 lacks something."""

    def missing(*_: object, **__: object) -> None:
        raise ConfigError("there is no such thing on this machine")

    if processes.rank() == 1:
        places: dict[str, Any] = {"build_objective": run_startup, "use_shards": image_folders}
        setattr(places.get(where, training), where, missing)
    return run_main(lambda: training._train_only(recipe.load(path)) and 0)


@pytest.mark.parametrize("where", ["use_shards", "pick_device", "open_samples", "build_objective", "check_engine"])
def test_an_error_of_one_rank_ends_all_at_once(where: str, shards: Path, tmp_path: Path):
    """Before the process group exists and afterwards: no rank waits for a time-out, and the error is printed once."""
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "parallel.mode=ddp")
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(cfg))
    outputs = [(os.devnull, str(tmp_path / f"{rank}.txt")) for rank in range(2)]
    started = [
        Forked(fail_on_rank_1, str(path), where, env=e, output=out)
        for e, out in zip(environments(2), outputs, strict=True)
    ]
    assert [process.wait(60) for process in started] == [2, 2]
    said, other = (Path(file).read_text() for _, file in outputs)
    assert said == "error: rank 1 of 2: there is no such thing on this machine\n" and not other


def reach_engine(path: str, target: str) -> int:
    """One rank of a run up to its engine, whose arguments are written to a file."""

    def build_engine(objective: torch.nn.Module, cfg: recipe.Recipe, device: torch.device) -> None:
        places = sorted({p.device.type for p in objective.parameters()})
        Path(target, f"{processes.rank()}.json").write_text(json.dumps([cfg.precision, places]))
        raise Reached

    training.build_engine = build_engine
    try:
        training._train_only(recipe.load(path))
    except Reached:
        return 0
    return 1


def test_auto_precision_on_an_accelerator_builds_nothing_on_it(shards: Path, tmp_path: Path):
    """The meta device stands for the accelerator. Rank 0 has the weights in host memory, the other rank has none,
    and both have the same precision."""
    cfg = tiny_recipe("mae", shards, tmp_path / "run", "parallel.mode=fsdp2", "precision=auto", "device=meta")
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(cfg))
    assert wait([Forked(reach_engine, str(path), str(tmp_path), env=e) for e in environments(2)]) == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [["bf16", ["cpu"]], ["bf16", ["meta"]]]
    assert recipe.load(tmp_path / "run").precision == "bf16"
