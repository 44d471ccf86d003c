"""Tests that need a GPU. `make test-gpu` runs them on CUDA; `make test` runs the cheap ones on the CPU, so that
their code stays correct (`tests/test_gpu_suite.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.host_syncs import forbidden
from pretrain.parallel.device import set_tf32

CUDA_ONLY = ("test_kernels.py",)  # what is there for CUDA alone


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.option.device == "cpu" and collection_path.name in CUDA_ONLY else None


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    chosen = torch.device(pytestconfig.option.device)
    return torch.device("cuda", 0) if chosen.type == "cuda" else chosen


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """fp32 products are exact to fp32 unless an engine allows TF32; memory of the previous test is freed."""
    set_tf32(False)
    yield
    set_tf32(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_syncs(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a host sync an error. On a CPU it does nothing."""
    return forbidden() if device.type == "cuda" else contextlib.nullcontext()
