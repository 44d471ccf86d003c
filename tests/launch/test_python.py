"""`train()` called from Python: interrupted, called again, and in a thread; in a script, in IPython and in a
notebook kernel."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import config
from pretrain.signals import EXIT_STOPPED
from pretrain.train import train
from tests.conftest import sampled, tiny_recipe

SOURCE = """
import os, signal, threading, time
from pathlib import Path
from pretrain.recipes.recipe import load
from pretrain.train import train

folder = Path({folder!r})
handlers = lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)]
steps = lambda: path.read_text().count("\\n") if (path := folder / "first" / "metrics.jsonl").is_file() else 0

def interrupt():
    while steps() < 3:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

before = handlers()
threading.Thread(target=interrupt).start()
try:
    train(load(str(folder / "recipe.yaml"), [f"run={{folder / 'first'}}", "steps=100000"]))
except KeyboardInterrupt:
    print("INTERRUPTED")
assert handlers() == before
assert (folder / "first" / "checkpoints" / f"{{steps():09d}}").is_dir()
second = load(str(folder / "recipe.yaml"), [f"run={{folder / 'second'}}", "steps=2"])
thread = threading.Thread(target=train, args=(second,))
thread.start()
thread.join()
assert (folder / "second" / "export" / "2" / "config.json").is_file() and handlers() == before
print("DONE")
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", sampled(["script", "IPython", "kernel"], "script", "kernel"))
def test_interrupted_then_called_again(where: str, shards: Path, tmp_path: Path):
    recipe = tiny_recipe("mae", shards, tmp_path / "first", "checkpoint=100000", "data.workers=1")
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe))
    source = SOURCE.format(folder=str(tmp_path))
    if where == "kernel":
        out, error = in_kernel(source)
    else:
        (tmp_path / "script.py").write_text(source)
        command = [sys.executable, *(["-m", "IPython"] if where == "IPython" else []), str(tmp_path / "script.py")]
        environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        out, error = done.stdout, done.stderr
        assert done.returncode == 0, error
    assert "INTERRUPTED" in out and "stopped as asked, after a checkpoint" in out and "DONE" in out, out + error
    assert "Traceback" not in out + error


def in_kernel(source: str) -> tuple[str, str]:
    """(output of a cell, its error) in a separate kernel."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    said: list[str] = []

    def hear(message: dict) -> None:
        content = message["content"]
        said.append(content.get("text", "") or "\n".join(content.get("traceback", ())))

    try:
        reply = client.execute_interactive(source, timeout=300, output_hook=hear, allow_stdin=False)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return "".join(said), "" if reply["content"]["status"] == "ok" else str(reply["content"])


@pytest.mark.slow
def test_sigterm_ends_by_system_exit(shards: Path, tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    with pytest.raises(SystemExit) as stopped:
        train(tiny_recipe("mae", shards, tmp_path / "run", "steps=100000", "checkpoint=100000"))
    assert stopped.value.code == EXIT_STOPPED and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_the_garbage_collector_is_as_before(frozen: bool, shards: Path, tmp_path: Path):
    """Objects that the caller has frozen stay frozen; those that the training froze do not."""
    held = gc.get_freeze_count() > 0
    (gc.freeze if frozen else gc.unfreeze)()
    before = gc.get_freeze_count()
    try:
        train(tiny_recipe("mae", shards, tmp_path / "run", "steps=1"))
        assert (before > 0) == frozen and gc.isenabled()
        assert (gc.get_freeze_count() > 0.9 * before) if frozen else gc.get_freeze_count() == 0
    finally:
        (gc.freeze if held else gc.unfreeze)()
