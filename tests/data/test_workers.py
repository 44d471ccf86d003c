"""Data workers with every start method: they get the objects that they need, make the same batches, and end with the
trainer."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil
import pytest
import torch

from common import config
from data_pipeline.stream.stream import Stream
from data_pipeline.stream.worker_processes import start_method
from pretrain.build import build_objective, build_stream, open_samples
from pretrain.objectives import finder
from pretrain.train import train
from tests.conftest import QUICK, sampled, tiny_recipe
from tests.contract.own_objectives import OWN
from tests.forked import ROOT


def stream_of(name: str, shards: Path, *overrides: str) -> Stream:
    cfg = tiny_recipe(name, shards, Path("unused"), *overrides)
    return build_stream(cfg, build_objective(cfg, empty=True), open_samples(cfg))


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else True, key


@pytest.fixture
def own_part(tmp_path: Path) -> str:
    """An objective in a user's file, which also defines a part."""
    path = tmp_path / "mine.py"
    text = OWN["labels"].replace('"label": Label()', '"label": Class()')
    path.write_text(text.replace("class Labels(", "class Class(Label):\n    pass\n\n\nclass Labels("))
    return str(path)


@pytest.mark.parametrize("name", sampled(finder.names(), *QUICK, others=pytest.mark.slow))
def test_the_arguments_of_a_worker_can_be_pickled(name: str, shards: Path):
    """Datasets with open files, views that are nested functions, and parts."""
    batches = stream_of(name, shards).batches
    assert_same(batches[1], pickle.loads(ForkingPickler.dumps(batches))[1])


def masks(pid: int) -> dict[str, int]:
    """The signals that a process blocks (SigBlk), ignores (SigIgn) and handles (SigCgt), as bits."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line[:6]: int(line[7:], 16) for line in lines if line[:6] in ("SigBlk", "SigIgn", "SigCgt")}


@pytest.mark.slow
def test_workers_of_the_fork_server(own_part: str, shards: Path):
    """The workers are not children of the trainer, do not have its signal handlers, and end even while their code is
    stuck."""
    options = ["data.workers=2", "data.start_method=forkserver", "data.threads=2"]
    stream, plain = stream_of(own_part, shards, *options), stream_of(own_part, shards)
    stream.first()  # starts threads in this process
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        for _ in range(3):
            assert_same(next(stream), next(plain))
    finally:
        signal.signal(signal.SIGTERM, before)
    workers = [worker.pid for worker in stream._processes]
    for pid in workers:
        assert psutil.Process(pid).ppid() != os.getpid()
        found, bits = masks(pid), 1 << signal.SIGTERM - 1 | 1 << signal.SIGUSR1 - 1
        assert found["SigIgn"] & bits == bits and not (found["SigBlk"] | found["SigCgt"]) & bits
    os.kill(workers[0], signal.SIGSTOP)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 30 and not any(map(psutil.pid_exists, workers))


def test_the_start_method_follows_the_device():
    """A process with CUDA and NCCL is not forked."""
    assert [start_method("auto", device) for device in ("cpu", "cuda", "xpu")] == ["fork", "forkserver", "forkserver"]
    assert start_method("fork", "cuda") == "fork"


@pytest.mark.slow
def test_a_script_trains_with_every_start_method(own_part: str, shards: Path, tmp_path: Path):
    """The workers do not run a script again that has no `if __name__ == "__main__"`, and the losses equal those without
    workers."""
    cfg = tiny_recipe(own_part, shards, tmp_path / "plain", "steps=3", "eval.pixels=false")
    (tmp_path / "recipe.yaml").write_text(config.dump(cfg))
    script = tmp_path / "script.py"
    script.write_text(
        "from pretrain.recipes.recipe import load\nfrom pretrain.train import train\n\n"
        "for method in ('forkserver', 'spawn'):\n"
        "    train(load('recipe.yaml', ['data.workers=1', f'data.start_method={method}', f'run={method}']))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    train(cfg)
    assert losses("forkserver") == losses("spawn") == losses("plain") and len(losses("plain")) == 3
