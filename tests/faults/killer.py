"""A trainer that is killed at a given phase of a save: `python -m tests.faults.killer RUN` with KILL="RANK PHASE COUNT" in the environment.

Phases: the methods of `pretrain.checkpoint_store.Disk`; the process ends by SIGKILL at the COUNT-th call, before it or (PHASE+) after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from pretrain.checkpoint_store import Disk
from pretrain.errors import command
from pretrain.train import main


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(method: str, after: bool, count: int) -> None:
    original = getattr(Disk, method)
    calls = 0

    def counted(self: Disk, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            end()
        out = original(self, *args)
        if calls == count and after:
            end()
        return out

    @contextlib.contextmanager
    def writing(self: Disk, *args: Any):
        nonlocal calls
        calls += 1
        with original(self, *args) as stream:
            if calls == count:
                stream.write(b"half")
                stream.flush()
                end()
            yield stream

    setattr(Disk, method, writing if method == "write" else counted)


if __name__ == "__main__":
    rank, phase, count = os.environ.get("KILL", "-1 begin 1").split()
    if os.environ.get("RANK", "0") == rank:
        arm(phase.rstrip("+"), phase.endswith("+"), int(count))
    sys.exit(command(main))
