"""Signals as schedulers send them, to every process of a run at once: code 75 and a checkpoint, or code 75 at once where there is nothing to save."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from common import config
from launch.local import environments
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.run_folder.run_lock import Lock
from pretrain.signals import EXIT_STOPPED, STOPPED_EARLY, Stop, Stopped
from pretrain.train import train
from tests.conftest import tiny_recipe
from tests.faults import killer
from tests.faults.test_kill import rows, wait_for
from tests.forked import Forked
from tests.services import FaultProxy, ObjectStore, environment


def start(shards: str | Path, run: Path, *overrides: str, module: str = "launch.cli") -> subprocess.Popen:
    """A run with a data worker, from the command or as torchrun starts it."""
    path = run.with_suffix(".yaml")
    options = ("steps=100000", "checkpoint=100000", "data.workers=1", "eval.pixels=false", *overrides)
    path.write_text(config.dump(tiny_recipe("mae", Path(shards), run, f"data.train={shards}", *options)))
    words = ["train", str(path)] if module == "launch.cli" else [str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", module, *words], start_new_session=True, **pipes)


def everyone(process: subprocess.Popen | Forked) -> list[psutil.Process]:
    """The process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def signal_all(process: subprocess.Popen, number: signal.Signals) -> list[psutil.Process]:
    """What a service manager does to a control group."""
    members = everyone(process)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    return members


def ended(process: subprocess.Popen, members: list[psutil.Process]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    psutil.wait_procs(members, timeout=30)
    assert not [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    return process.returncode, out, error


@pytest.mark.slow
def test_a_signal_to_every_process_ends_the_run_with_a_checkpoint(shards: Path, tmp_path: Path):
    """Launcher, trainer, data worker, the process that fetches, and evaluation."""
    more = [f"data.fetch.cache={tmp_path / 'cache'}", f"eval.gallery={shards}", f"eval.val={shards}"]
    process = start(shards, tmp_path / "run", *more)
    assert wait_for(lambda: len(rows(tmp_path / "run")) > 3, process), process.communicate()
    members = signal_all(process, signal.SIGTERM)
    assert len(members) >= 5
    code, out, error = ended(process, members)
    assert code == EXIT_STOPPED and "stopped as asked, after a checkpoint" in out and "Traceback" not in error, error
    done = rows(tmp_path / "run")
    assert [row["step"] for row in done] == list(range(len(done)))
    assert max(complete_checkpoints(tmp_path / "run")).name == f"{len(done):09d}"


@pytest.mark.slow
def test_a_signal_to_the_process_group_of_the_trainer(shards: Path, tmp_path: Path):
    process = start(shards, tmp_path / "run", module="pretrain.train")
    assert wait_for(lambda: len(rows(tmp_path / "run")) > 3, process), process.communicate()
    members = everyone(process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, error = ended(process, members)
    assert code == EXIT_STOPPED and not error, error
    assert max(complete_checkpoints(tmp_path / "run")).name == f"{len(rows(tmp_path / 'run')):09d}"


def hears(process: subprocess.Popen, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal: Python itself takes a moment to begin."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["launch.cli", "pretrain.train"])
def test_a_signal_during_the_start(module: str, shards: Path, tmp_path: Path):
    """While torch is imported, and when the run folder is there but no step is done."""
    for moment in ("import", "build"):
        process = start(shards, tmp_path / moment, module=module)
        there = (tmp_path / "build").is_dir
        assert wait_for(there if moment == "build" else lambda own=process: hears(own, signal.SIGTERM), process)
        members = signal_all(process, signal.SIGTERM)
        code, out, error = ended(process, members)
        assert code == EXIT_STOPPED and "Traceback" not in error, error
        assert STOPPED_EARLY.partition(",")[0] in out + error


@pytest.fixture
def remote(proxy: FaultProxy, store: ObjectStore, shards: Path) -> str:
    """The shards in a store, behind a proxy."""
    return store.put_folder(shards, "signals")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_while_the_store_does_not_answer(
    workers: int, remote: str, shards: Path, proxy: FaultProxy, tmp_path: Path
):
    """The checkpoint is of the steps that were done, and the run that goes on from it is the one that nobody stopped."""
    more = [f"data.workers={workers}", "data.fetch.ahead_mb=0.001", "steps=60"]
    process = start(remote, tmp_path / "run", *more)
    assert wait_for(lambda: len(rows(tmp_path / "run")) > 1, process), process.communicate()
    proxy.set(hang=1)
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 1.5:  # until no step is done any more
        if len(rows(tmp_path / "run")) != seen:
            seen, since = len(rows(tmp_path / "run")), time.monotonic()
        time.sleep(0.05)
    assert seen < 60 and process.poll() is None
    code, _, error = ended(process, signal_all(process, signal.SIGTERM))
    assert code == EXIT_STOPPED and "Traceback" not in error, error
    done = len(rows(tmp_path / "run"))
    assert max(complete_checkpoints(tmp_path / "run")).name == f"{done:09d}"
    proxy.set()
    if workers:
        options = ("steps=60", "checkpoint=100000", "eval.pixels=false")
        whole = train(tiny_recipe("mae", shards, tmp_path / "whole", *options))
        train(tiny_recipe("mae", shards, tmp_path / "run", f"data.train={remote}", *options))
        assert f"resumes from step {done} " in (tmp_path / "run" / "log.txt").read_text()
        losses = [[(row["step"], row["loss"]) for row in rows(run)] for run in (tmp_path / "run", whole)]
        assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_signal_while_the_store_does_not_answer_at_the_start(remote: str, proxy: FaultProxy, tmp_path: Path):
    proxy.set(hang=1)
    process = start(remote, tmp_path / "run")
    assert wait_for(lambda: bool(proxy.requests), process)
    code, out, error = ended(process, signal_all(process, signal.SIGTERM))
    assert code == EXIT_STOPPED and STOPPED_EARLY in out + error and "Traceback" not in error, error


class Trap(list):
    """The requests of a proxy, which answers none any more from the first one for a shard on."""

    def __init__(self, proxy: FaultProxy):
        super().__init__()
        self.proxy = proxy

    def append(self, line: str) -> None:
        super().append(line)
        if ".tar" in line:
            self.proxy.set(hang=1)


@pytest.mark.slow
def test_a_signal_while_the_store_of_one_of_two_processes_does_not_answer(
    remote: str, shards: Path, store: ObjectStore, proxy: FaultProxy, tmp_path: Path, request: pytest.FixtureRequest
):
    """In the midst of a run, and in the first step of the one that goes on from there; then it comes to its end as the run that nobody stopped."""
    options = ["steps=40", "checkpoint=100000", "eval.pixels=false", "data.workers=1", "data.fetch.ahead_mb=0.001"]
    options += ["parallel.mode=ddp", "parallel.micro_batch=4"]
    run, errors = tmp_path / "run", tmp_path / "errors"
    log = run / "log.txt"

    def begin(folder: Path, data: str | Path) -> list[Forked]:
        path = folder.with_suffix(".yaml")
        path.write_text(config.dump(tiny_recipe("mae", shards, folder, f"data.train={data}", *options)))
        ways = [environment(store.port), {}]  # only process 1 has the proxy before it
        processes = [
            Forked(killer.run, [str(path)], env={**rank, **way}, output=(os.devnull, str(errors)))
            for rank, way in zip(environments(2), ways, strict=True)
        ]
        for process in processes:
            request.addfinalizer(process.kill)
        return processes

    def stop(processes: list[Forked]) -> None:
        for member in [member for process in processes for member in everyone(process)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [EXIT_STOPPED, EXIT_STOPPED], errors.read_text()
        assert "Traceback" not in errors.read_text() and max(complete_checkpoints(run)).name == f"{len(rows(run)):09d}"

    processes = begin(run, remote)
    assert wait_for(lambda: len(rows(run)) > 1, processes[0]), errors.read_text()
    proxy.set(hang=1)
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < 1.5:  # until no step is done any more
        if len(rows(run)) != seen:
            seen, since = len(rows(run)), time.monotonic()
        time.sleep(0.05)
    stop(processes)
    done = rows(run)
    assert [(row["step"], row.get("skipped")) for row in done] == [(n, None) for n in range(len(done))] and len(
        done
    ) < 40
    assert "changed nothing" not in log.read_text()

    proxy.set()
    proxy.requests = Trap(proxy)
    processes = begin(run, remote)
    assert wait_for(lambda: proxy.faults["hang"] and f"resumes from step {len(done)} " in log.read_text(), processes[0])
    time.sleep(1)  # process 0 has its data, and waits in the step for the other
    stop(processes)
    assert STOPPED_EARLY in errors.read_text() and len(rows(run)) == len(done)

    proxy.requests = []
    proxy.set()
    for folder, data in ((run, remote), (tmp_path / "whole", shards)):
        assert [process.wait(120) for process in begin(folder, data)] == [0, 0], errors.read_text()
    losses = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)] for folder in (run, tmp_path / "whole")
    ]
    assert len(losses[0]) == 40 and losses[0] == losses[1]


@pytest.mark.slow
def test_a_store_may_be_away_for_longer_than_processes_wait_in_a_step(
    remote: str, shards: Path, store: ObjectStore, proxy: FaultProxy, tmp_path: Path, request: pytest.FixtureRequest
):
    """The store of one of two processes does not answer for longer than parallel.timeout, but not for data.fetch.retry_seconds."""
    run, errors, timeout = tmp_path / "run", tmp_path / "errors", 3
    options = [f"data.train={remote}", "steps=12", "data.workers=1", "data.fetch.ahead_mb=0.001", "eval.pixels=false"]
    options += ["parallel.mode=ddp", f"parallel.timeout={timeout}", "data.fetch.retry_seconds=100"]
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(tiny_recipe("mae", shards, run, *options)))
    proxy.set(latency=0.2)
    ways = [environment(store.port), {}]  # only process 1 has the proxy before it
    processes = [
        Forked(killer.run, [str(path)], env={**rank, **way}, output=(os.devnull, str(errors)))
        for rank, way in zip(environments(2), ways, strict=True)
    ]
    for process in processes:
        request.addfinalizer(process.kill)
    assert wait_for(lambda: len(rows(run)) > 1, processes[0]), errors.read_text()
    proxy.set(hang=1)
    time.sleep(3 * timeout)
    assert len(rows(run)) < 12
    proxy.set()
    assert [process.wait(120) for process in processes] == [0, 0], errors.read_text()


# ---------------------------------------------------------------- in one process
def test_handlers_are_put_back_and_a_signal_before_the_first_step_raises():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    with Stop() as stop, pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before


def test_a_signal_while_the_lock_is_taken_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The signal arrives before the thread that renews the lock has started."""
    start_thread = threading.Thread.start

    def start_after_a_signal(thread: threading.Thread) -> None:
        signal.raise_signal(signal.SIGTERM)
        start_thread(thread)

    lock = Lock()
    with Stop():
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(threading.Thread, "start", start_after_a_signal)
            lock.take(tmp_path)
        lock.release()
    assert not list(tmp_path.iterdir())
