"""Signals as schedulers send them, to every process of a run at once: the run ends with code 75 after a checkpoint, or at
once if there is nothing to save."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from common import config
from launch.local import environments
from pretrain.checkpoint.open_store import complete_checkpoints
from pretrain.run_folder.run_lock import Lock
from pretrain.signals import EXIT_STOPPED, STOPPED_EARLY, Stop, Stopped
from pretrain.train import train
from tests.conftest import sampled, tiny_recipe
from tests.faults import killer
from tests.faults.test_kill import rows, wait_for
from tests.forked import Forked
from tests.services import FaultProxy, ObjectStore, environment


def recipe_file(shards: str | Path, run: Path, *overrides: str) -> Path:
    """A recipe with a data worker."""
    path = run.with_suffix(".yaml")
    options = ("steps=100000", "checkpoint=100000", "data.workers=1", "eval.pixels=false", *overrides)
    path.write_text(config.dump(tiny_recipe("mae", Path(shards), run, f"data.train={shards}", *options)))
    return path


def start(shards: str | Path, run: Path, *overrides: str, module: str = "launch.cli") -> subprocess.Popen:
    """Start a run, with the command `unlabeled train` or as torchrun starts it."""
    path = recipe_file(shards, run, *overrides)
    words = ["train", str(path)] if module == "launch.cli" else [str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", module, *words], start_new_session=True, **pipes)


def everyone(process: subprocess.Popen | Forked) -> list[psutil.Process]:
    """The process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


class Trainer(Forked):
    """The trainer of a run, which is started faster than with a command. Its output goes to files beside the
    recipe."""

    def __init__(self, path: Path):
        self.files = [Path(f"{path}.{name}") for name in ("out", "errors")]
        super().__init__(killer.run, [str(path)], output=(str(self.files[0]), str(self.files[1])))

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.files[0].read_text(), self.files[1].read_text()


def signal_all(process: subprocess.Popen | Trainer, number: signal.Signals) -> list[psutil.Process]:
    """Send a signal to all processes of a run, as a service manager does to a control group. Returns them."""
    members = everyone(process)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    return members


def ended(process: subprocess.Popen | Trainer, members: list[psutil.Process]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    psutil.wait_procs(members, timeout=30)
    assert not [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    return process.returncode, out, error


@pytest.mark.slow
def test_a_signal_to_every_process_ends_the_run_with_a_checkpoint(shards: Path, tmp_path: Path):
    """There are five: launcher, trainer, data worker, prefetch server, and evaluation."""
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


def has_handler(process: subprocess.Popen, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal. It has none until Python has started."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


STARTS = [(module, moment) for module in ("launch.cli", "pretrain.train") for moment in ("import", "build")]


@pytest.mark.slow
@pytest.mark.parametrize("case", sampled(STARTS, *set(STARTS) - {("pretrain.train", "build")}), ids=str)
def test_a_signal_during_the_start(case: tuple[str, str], shards: Path, tmp_path: Path):
    """While torch is imported, and when the run folder exists but no step has been trained."""
    module, moment = case
    process = start(shards, tmp_path / "run", module=module)
    exists = (tmp_path / "run").is_dir
    assert wait_for(exists if moment == "build" else lambda: has_handler(process, signal.SIGTERM), process)
    members = signal_all(process, signal.SIGTERM)
    code, out, error = ended(process, members)
    assert code == EXIT_STOPPED and "Traceback" not in error, error
    assert STOPPED_EARLY.partition(",")[0] in out + error


@pytest.fixture
def remote(proxy: FaultProxy, store: ObjectStore, shards: Path) -> str:
    """The URL of the shards in a store behind a proxy."""
    return store.put_folder(shards, "signals")


def wait_until_no_step_is_trained(run: Path) -> None:
    """Wait until the number of trained steps has not changed for 1.5 seconds."""
    steps, since = -1, time.monotonic()
    while time.monotonic() - since < 1.5:
        if len(rows(run)) != steps:
            steps, since = len(rows(run)), time.monotonic()
        time.sleep(0.05)


Begin = Callable[[Path, Sequence[str]], list[Forked]]


@pytest.fixture
def begin(shards: Path, store: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest) -> Begin:
    """A function that starts a run of two processes in a folder, with these overrides; process 0 reaches the store
    directly, process 1 through the proxy. Both write their errors to the file `errors`."""

    def begin(run: Path, overrides: Sequence[str]) -> list[Forked]:
        path = run.with_suffix(".yaml")
        path.write_text(config.dump(tiny_recipe("mae", shards, run, *overrides, "parallel.mode=ddp")))
        variables = [environment(store.port), {}]  # those of process 1 are the test's, which name the proxy
        processes = [
            Forked(killer.run, [str(path)], env={**rank, **own}, output=(os.devnull, str(tmp_path / "errors")))
            for rank, own in zip(environments(2), variables, strict=True)
        ]
        for process in processes:
            request.addfinalizer(process.kill)
        return processes

    return begin


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_while_the_store_does_not_answer(
    workers: int, remote: str, shards: Path, proxy: FaultProxy, tmp_path: Path
):
    """The checkpoint holds the trained steps, and the run that resumes from it has the losses of an undisturbed run."""
    more = [f"data.workers={workers}", "data.fetch.ahead_mb=0.001", "steps=60"]
    process = Trainer(recipe_file(remote, tmp_path / "run", *more))
    assert wait_for(lambda: len(rows(tmp_path / "run")) > 1, process), process.communicate()
    proxy.set(hang=1)
    wait_until_no_step_is_trained(tmp_path / "run")
    assert len(rows(tmp_path / "run")) < 60 and process.poll() is None
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
    process = Trainer(recipe_file(remote, tmp_path / "run"))
    assert wait_for(lambda: bool(proxy.requests), process)
    code, out, error = ended(process, signal_all(process, signal.SIGTERM))
    assert code == EXIT_STOPPED and STOPPED_EARLY in out + error and "Traceback" not in error, error


class Trap(list):
    """The list of a proxy's requests. With the first request for a shard, the proxy stops answering."""

    def __init__(self, proxy: FaultProxy):
        super().__init__()
        self.proxy = proxy

    def append(self, line: str) -> None:
        super().append(line)
        if ".tar" in line:
            self.proxy.set(hang=1)


@pytest.mark.slow
def test_a_signal_while_the_store_of_one_of_two_processes_does_not_answer(
    remote: str, shards: Path, proxy: FaultProxy, tmp_path: Path, begin: Begin
):
    """In the middle of a run, and in the first step after it was resumed; then it ends with the losses of an undisturbed
    run."""
    options = ["steps=40", "checkpoint=100000", "eval.pixels=false", "data.workers=1", "data.fetch.ahead_mb=0.001"]
    options += ["parallel.micro_batch=4", f"data.train={remote}"]
    run, errors = tmp_path / "run", tmp_path / "errors"
    log = run / "log.txt"

    def stop(processes: list[Forked]) -> None:
        for member in [member for process in processes for member in everyone(process)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [EXIT_STOPPED, EXIT_STOPPED], errors.read_text()
        assert "Traceback" not in errors.read_text() and max(complete_checkpoints(run)).name == f"{len(rows(run)):09d}"

    processes = begin(run, options)
    assert wait_for(lambda: len(rows(run)) > 1, processes[0]), errors.read_text()
    proxy.set(hang=1)
    wait_until_no_step_is_trained(run)
    stop(processes)
    done = rows(run)
    assert len(done) < 40
    assert [(row["step"], row.get("skipped")) for row in done] == [(n, None) for n in range(len(done))]
    assert "changed nothing" not in log.read_text()

    proxy.set()
    proxy.requests = Trap(proxy)
    processes = begin(run, options)
    assert wait_for(lambda: proxy.faults["hang"] and f"resumes from step {len(done)} " in log.read_text(), processes[0])
    time.sleep(1)  # process 0 has its data, and waits in the step for process 1
    stop(processes)
    assert STOPPED_EARLY in errors.read_text() and len(rows(run)) == len(done)

    proxy.requests = []
    proxy.set()
    for folder, data in ((run, remote), (tmp_path / "whole", shards)):
        overrides = [*options, f"data.train={data}"]
        assert [process.wait(120) for process in begin(folder, overrides)] == [0, 0], errors.read_text()
    losses = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)] for folder in (run, tmp_path / "whole")
    ]
    assert len(losses[0]) == 40 and losses[0] == losses[1]


@pytest.mark.slow
def test_a_store_may_be_away_for_longer_than_processes_wait_in_a_step(
    remote: str, proxy: FaultProxy, tmp_path: Path, begin: Begin
):
    """The store of one of two processes does not answer for longer than parallel.timeout, but for less than
    data.fetch.retry_seconds."""
    run, errors, timeout = tmp_path / "run", tmp_path / "errors", 3
    options = [f"data.train={remote}", "steps=12", "data.workers=1", "data.fetch.ahead_mb=0.001", "eval.pixels=false"]
    options += [f"parallel.timeout={timeout}", "data.fetch.retry_seconds=100"]
    proxy.set(latency=0.2)
    processes = begin(run, options)
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
