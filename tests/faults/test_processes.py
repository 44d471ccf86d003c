"""Runs of several processes that are killed, stopped or hang, and are resumed with another number of processes and
in another mode."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from common import config
from launch.local import environments, wait
from pretrain.interchange import export
from pretrain.parallel import processes, silent_ranks, timeouts
from pretrain.train import EXIT_STOPPED
from tests.conftest import sampled, tiny_recipe, unlabeled
from tests.faults import killer
from tests.faults.test_kill import rows, wait_for
from tests.forked import Forked

# Modes round in different ways, and training makes of that another path in time: slowly with a small lr and a large eps (where a gradient is zero but
# for rounding, Adam makes steps of the rounding)
COMMON = (
    "data.batch=12",
    "steps=24",
    "checkpoint=100",
    "export=100",
    "eval.pixels=false",
    "optim.eps=1e-3",
    "optim.lr=1e-4",
)


def recipe_file(name: str, shards: Path, run: Path, *overrides: str) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(config.dump(tiny_recipe(name, shards, run, *COMMON, *overrides)))
    return path


def start(path: Path, processes: int, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.cli", "train", str(path), *overrides, "--processes", str(processes)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    error = process.communicate()[1]
    return process.returncode, error


def ranks(path: Path, count: int, *overrides: str, **env: str) -> list[Forked]:
    """Start the processes of a run without the command; their output goes to PATH.errors."""
    return [
        Forked(killer.run, [str(path), *overrides], env={**env, **e}, output=(os.devnull, f"{path}.errors"))
        for e in environments(count)
    ]


def errors(path: Path) -> str:
    file = Path(f"{path}.errors")
    return file.read_text() if file.exists() else ""


CHAINS = {
    "mae": [(4, "fsdp2", "parallel.replicate=2"), (2, "zero2"), (1, "single"), (3, "ddp")],
    "simclr": [(3, "ddp"), (2, "zero1"), (4, "fsdp2"), (1, "single")],
    "dinov2": [(2, "fsdp2"), (2, "zero3"), (1, "single"), (3, "fsdp2")],
}
# With `clip_scope: module`, ZeRO divides parameter groups. Its checkpoints must have the groups of the other modes.
CHAIN_OPTIONS = {"dinov2": ("optim.clip=0.5", "optim.clip_scope=module")}


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(CHAINS, "dinov2"))
def test_goes_on_with_other_processes_in_another_mode(name: str, shards: Path, tmp_path: Path):
    """The first run of the chain is started and stopped by the command, which passes the signal on to its processes."""
    options = CHAIN_OPTIONS.get(name, ())
    path = recipe_file(name, shards, tmp_path / "whole", *options)
    assert wait(ranks(path, 1)) == 0, errors(path)
    run = tmp_path / "chain"
    path = recipe_file(name, shards, run, *options)
    for n, (count, mode, *more) in enumerate(CHAINS[name]):
        command = start(path, count, f"parallel.mode={mode}", *more) if n == 0 else None
        started = [] if command else ranks(path, count, f"parallel.mode={mode}", *more)
        last = n + 1 == len(CHAINS[name])
        if not last:
            assert wait_for(lambda n=n: len(rows(run)) >= 5 * (n + 1), command or started[0]), errors(path)
            for process in [command] if command else started:
                process.send_signal(signal.SIGTERM)
        code, error = finish(command) if command else (wait(started), errors(path))
        assert code == (0 if last else EXIT_STOPPED), error
    found, expected = rows(run), rows(tmp_path / "whole")
    assert [r["step"] for r in found] == list(range(24))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=3e-5)


PHASES = ["begin", "begin+", "write", "publish", "publish+", "set_latest", "set_latest+", "delete"]


def killed(path: Path, phase: str | None, rank: int, *overrides: str) -> None:
    """Resume a run of two processes, and kill one of them in a phase of a save or, without a phase, at a random
    moment."""
    run = path.with_suffix("")
    if phase:
        started = ranks(path, 2, *overrides, KILL=f"{rank} {phase} {3 if phase == 'write' and rank == 0 else 2}")
    else:
        started = ranks(path, 2, *overrides)
        before = len(rows(run))
        wait_for(lambda: len(rows(run)) > before + random.randint(1, 4), started[0])
        time.sleep(random.random() / 10)
        started[rank].kill()
    code = wait(started)
    assert started[rank].returncode == -signal.SIGKILL, (
        f"{phase}: process {rank} ended with {started[rank].returncode}, {code}"
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("at_random", "steps"), [(2, 60), pytest.param(12, 200, marks=pytest.mark.matrix)]
)  # with the phases, 10 and 20 kills
def test_one_of_two_killed_again_and_again(at_random: int, steps: int, shards: Path, tmp_path: Path):
    """At random moments and in each phase of a save: the losses equal those of an undisturbed run bit for bit."""
    size = (f"steps={steps}", "checkpoint.every=2", "parallel.mode=fsdp2", "data.workers=1")
    assert wait(ranks(recipe_file("mae", shards, tmp_path / "whole", *size, "checkpoint.every=1000"), 2)) == 0
    run = tmp_path / "killed"
    path = recipe_file("mae", shards, run, *size)
    moments = [*PHASES, *[None] * at_random]
    random.shuffle(moments)
    for n, phase in enumerate(moments):
        writes = "async" if n % 2 else "sync"
        rank = random.randint(0, 1) if phase in (None, "write") else 0  # the other phases are process 0's
        killed(path, phase, rank, f"checkpoint.mode={writes}")
    reached = len(rows(run))
    assert wait(ranks(path, 2, "checkpoint.every=1000")) == 0, errors(path)
    assert reached < steps and [(r["step"], r["loss"], r["grad_norm"]) for r in rows(run)] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in rows(tmp_path / "whole")
    ]
    assert not list((run / "checkpoints").glob(".*.partial"))


@pytest.mark.slow
def test_a_hung_process_is_named(shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    path = recipe_file("mae", shards, run, "steps=100000", "parallel.mode=ddp", "parallel.timeout=4")
    started = ranks(path, 2)
    assert wait_for(lambda: len(rows(run)) > 3, started[0]), errors(path)
    started[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code, error = started[0].wait(60), errors(path)
    assert code == 1 and time.monotonic() - began < 20
    name = socket.gethostname()
    assert f"error: rank 0 of 2 on {name}: a collective failed at step" in error and "Traceback" not in error, error
    assert f"; no answer from rank 1 on {name}: " in error
    started[1].kill()
    started[1].wait()


def test_the_ranks_that_do_not_answer(monkeypatch: pytest.MonkeyPatch):
    """Rank 0 and rank 3 have timed out, and rank 1 has lost its connection to one of them; rank 2 hangs."""
    monkeypatch.setattr(silent_ranks, "REPORT_SECONDS", 0.3)
    store = dist.HashStore()
    for rank in range(4):
        store.set(f"host_{rank}", f"h{rank}")
    with ThreadPoolExecutor() as pool:
        told = [*pool.map(lambda rank: silent_ranks._ask(store, rank, 4, timed_out=rank != 1), (0, 3, 1))]
    assert set(told[:2]) == {"no answer from rank 2 on h2"} and told[2] in (told[0], silent_ranks.DIED)
    store = dist.HashStore()
    assert silent_ranks._ask(store, 0, 2, timed_out=False) == silent_ranks.DIED
    assert silent_ranks._ask(store, 1, 2, timed_out=True) == "all ranks answer"


def lost_between_two_steps() -> None:
    """Rank 1 is suspended when a step has ended, before it tells the others that it trains another one."""
    silent_ranks.REPORT_SECONDS = 1.0
    processes.start("ddp", torch.device("cpu"))
    agreement = processes.Agreement()
    agreement.tell(0)
    assert agreement.answer() == 0
    timeouts.shorten(1.0)
    processes.on_every_rank(lambda: None)
    if processes.rank() == 1:
        time.sleep(60)
    said = r"rank 0 of 2 on .*at step 5; no answer from rank 1 on "
    with pytest.raises(timeouts.CollectiveError, match=said), timeouts.at_step(5):
        agreement.tell(0)
        agreement.answer()
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_is_lost_between_two_steps_is_noticed():
    first, second = (Forked(lost_between_two_steps, env=environment) for environment in environments(2))
    assert first.wait(30) == 0
    second.kill()


@pytest.mark.slow
def test_an_export_may_take_longer_than_the_time_out(shards: Path, tmp_path: Path):
    """A slow disk: rank 0 writes the model card into a FIFO, which is read only after the time-out of the other rank
    in a step."""
    run, timeout = tmp_path / "run", 4
    path = recipe_file("mae", shards, run, "steps=2")
    assert wait(ranks(path, 1)) == 0, errors(path)
    card = run / "export" / "4" / ".README.md"
    card.parent.mkdir()
    os.mkfifo(card)
    started = ranks(path, 2, "steps=4", "parallel.mode=ddp", f"parallel.timeout={timeout}")
    assert wait_for(lambda: (run / "export" / "4" / "config.json").exists(), started[0]), errors(path)
    time.sleep(1.5 * timeout)
    with card.open() as reader:
        text = reader.read()
    assert wait(started) == 0, errors(path)
    assert text.startswith("---") and [row["step"] for row in rows(run)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_errors_are_said_once(shards: Path, tmp_path: Path):
    path = recipe_file("mae", shards, tmp_path / "run", "parallel.mode=ddp")
    (tmp_path / "run").write_text("a file")
    code, error = finish(start(path, 2))
    assert code == 2 and error.count("is a file") == 1, error
    refused = unlabeled("train", path, "run=x", "parallel.mode=single", "--processes", "2")
    assert refused.returncode == 2 and "single is one process, not 2; write parallel.mode=ddp" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_commands_of_the_readme(launcher: str, shards: Path, tmp_path: Path):
    run = tmp_path / "run"
    mode = {"torchrun": "fsdp2", "deepspeed": "zero2"}[launcher]
    port = environments(2)[0]["MASTER_PORT"]  # a free one
    path = recipe_file("mae", shards, run, "steps=3", f"parallel.mode={mode}")
    command = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain.train"],
        "deepspeed": [
            "deepspeed.launcher.runner",
            f"--master_port={port}",
            "--num_gpus=2",
            "--no_local_rank",
            "--module",
            "pretrain.train",
        ],
    }[launcher]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *command, str(path)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    file = tmp_path / "model.safetensors"
    for words in (["verify", run], ["inspect", run], ["consolidate", run, file]):
        looked = unlabeled("checkpoint", *words)
        assert looked.returncode == 0 and not looked.stderr, looked.stderr
    weights, exported = load_file(file), export.load(run / "export" / "3")[0].state_dict()
    assert all(torch.equal(value, weights[f"backbone.{key}"]) for key, value in exported.items())
