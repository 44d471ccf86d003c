"""The network between two hosts is lost for a while, and for good. torchrun starts a rank on each host, with the command
of the documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import config
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.faults.test_kill import rows, wait_for
from tests.hosts import LINK, TwoHosts, missing

pytestmark = pytest.mark.slow
SMALL_STEPS = ("optim.eps=1e-3", "optim.lr=1e-4")  # with which the rounding of two processes changes little


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    if reason := missing():
        pytest.skip(f"NO NETWORK NAMESPACES HERE, SO A LOST NETWORK IS NOT TESTED: {reason}")
    with TwoHosts() as hosts:
        yield hosts


def start(hosts: TwoHosts, recipe: Path, read_timeout: int) -> list[subprocess.Popen]:
    """Start the run on both hosts. The output of host N goes to RECIPE.N."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK, "NCCL_SOCKET_IFNAME": LINK}
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.ADDRESSES[0]}:29500"]
    out = []
    for number, is_host in enumerate((1, 0)):
        conf = f"is_host={is_host},read_timeout={read_timeout}"
        with Path(f"{recipe}.{number}").open("w") as file:
            command = [*words, "--rdzv-conf", conf, "-m", "pretrain.train", recipe]
            out.append(hosts.start(number, *command, env=env, stdout=file, stderr=file))
    return out


def trains(run: Path, further: int, process: subprocess.Popen) -> None:
    """Wait until the run has trained so many further steps, and does not save a checkpoint."""
    before = len(rows(run))
    assert wait_for(lambda: len(rows(run)) >= before + further and len(rows(run)) % 10 in range(3, 8), process)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seconds", "timeout"), [(4, 12), pytest.param(30, 80, marks=pytest.mark.matrix)])
def test_the_link_between_two_hosts_is_cut(seconds: int, timeout: int, hosts: TwoHosts, shards: Path, tmp_path: Path):
    """For some seconds: the training waits, and goes on. For good: both hosts end within their time-outs, name who does
    not answer, and the same command resumes the run. Its losses are those of an undisturbed run of one process."""
    sizes = ("steps=60", "checkpoint=10", "eval.pixels=false", f"parallel.timeout={timeout}", *SMALL_STEPS)
    whole = train(tiny_recipe("mae", shards, tmp_path / "whole", *sizes))
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    path.write_text(config.dump(tiny_recipe("mae", shards, run, *sizes, "parallel.mode=ddp")))
    outputs = [Path(f"{path}.{number}") for number in range(2)]

    both = start(hosts, path, read_timeout=timeout)
    trains(run, 3, both[0])
    hosts.cut()
    time.sleep(seconds / 3)
    there = len(rows(run))
    time.sleep(seconds * 2 / 3)
    assert len(rows(run)) == there  # it waited
    hosts.connect()
    trains(run, 10, both[0])

    hosts.cut()
    assert both[0].wait(timeout + 60) == 1
    said = [
        r"error: rank 0 of 2 on host1: a collective failed at step (\d+); no answer from rank 1 on host2: ",
        r"error: rank 1 of 2 on host2: a collective failed at step (\d+); no answer from the store of the ranks at host1",
    ]
    assert wait_for(lambda: re.search(said[1], outputs[1].read_text()), both[1])
    both[1].kill()  # torchrun waits for its store on the other host until TCP gives up
    done = len(rows(run))
    for text, line in zip((path.read_text() for path in outputs), said, strict=True):
        (step,) = re.findall(line, text)
        assert int(step) == done, text

    hosts.connect()
    assert [host.wait(120) for host in start(hosts, path, timeout)] == [0, 0], outputs[0].read_text()
    (resumed,) = map(int, re.findall(r"resumes from step (\d+) ", outputs[0].read_text()))
    assert resumed == 10 * (done // 10) > 0
    found, expected = rows(run), rows(whole)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=3e-5)
