"""The tests of GPUs on a machine without one: their code runs with the CPU as the device, and the command that needs
a GPU ends with a clear message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
CHEAP = "mae and (wait or plan) or async"


def run(arguments: list[str]) -> int:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of the tests that started this one
        del os.environ[name]
    return int(pytest.main(arguments))


def started(folder: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, output) of pytest on tests/gpu in a separate process."""
    out = folder / "out"
    process = Forked(run, ["tests/gpu", *arguments], output=(str(out), str(out)), cwd=ROOT)
    return process.wait(500), out.read_text()


def test_without_a_gpu_it_ends_at_once(tmp_path: Path):
    code, text = started(tmp_path, "--device", "cuda")
    assert code == pytest.ExitCode.USAGE_ERROR and "--device cuda: torch finds no GPU here" in text


def test_without_a_device_they_are_not_collected(request: pytest.FixtureRequest):
    """As in `make test`."""
    assert conftest.pytest_ignore_collect(conftest.GPU_TESTS, request.config) is True
    assert conftest.pytest_ignore_collect(conftest.GPU_TESTS.parent, request.config) is None


@pytest.mark.slow
def test_all_of_them_can_be_collected(tmp_path: Path):
    code, text = started(tmp_path, "--collect-only", "--device", "cpu")
    assert code == 0, text
    for name in ("test_gpu_steps", "test_gpu_modes", "test_gpu_runs"):
        assert f"tests/gpu/{name}.py" in text


@pytest.mark.slow
def test_their_code_runs_on_a_cpu(tmp_path: Path):
    code, text = started(tmp_path, "--device", "cpu", "-k", CHEAP, "-m", "not slow")
    assert code == 0, text


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--device", "cpu", "--precision", "fp32"]
    rungs = ["dinov3_vits_views", "gpt_1b"]  # one from shards, one of text
    options = ["--compile", "false", "--steps", "1", "--warmup", "1", "--rungs", *rungs]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for rung in rungs:
        assert f'"gpu.{rung}.mfu"' in done.stdout and f'"gpu.{rung}.samples_per_second"' in done.stdout
