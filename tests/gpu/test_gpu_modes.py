"""Every mode on the available GPUs, with as many processes as the test on CPUs has, or as there are GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.local import environments, wait
from tests.conftest import tiny_recipe
from tests.forked import Forked
from tests.parallel import modes
from tests.parallel.test_modes import IN_CI, MODES, close

CASES = [(mode, name) for mode in MODES if mode != "single" and "bf16" not in mode for name in IN_CI[mode]]


def ranks(mode: str, device: torch.device) -> int:
    wanted = MODES[mode][1]
    return min(wanted, torch.cuda.device_count()) if device.type == "cuda" else wanted


def found(mode: str, name: str, shards: Path, folder: Path, device: torch.device) -> list[dict]:
    kind, _, options = MODES[mode]
    count = ranks(mode, device)
    options = options | ({"parallel.replicate": 1} if count == 1 and "parallel.replicate" in options else {})
    tiny_recipe(name, shards, folder)  # makes what its options name, before several processes look for it
    started = [
        Forked(modes.main, shards, kind, options, folder, [name], device.type, env=environment)
        for environment in environments(count)
    ]
    assert wait(started) == 0
    return [torch.load(folder / f"{rank}.pt")[name] for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), CASES)
def test_the_same_as_one_process_on_a_cpu(mode: str, name: str, device: torch.device, shards: Path, tmp_path: Path):
    """With offloading and ZeRO, too. A step that is not finite changes nothing, and the next step trains."""
    for folder in ("cpu", "device"):
        (tmp_path / folder).mkdir()
    (alone,) = found("single", name, shards, tmp_path / "cpu", torch.device("cpu"))
    for process in found(mode, name, shards, tmp_path / "device", device):
        close(process, alone, 1e-3, 1e-2)
        assert process["skipped"] == 1.0 and not process["changed"] and not process["stuck"]
