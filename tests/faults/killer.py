"""A trainer that is killed in a given phase of a save: `run([RUN, "key=value", …])` with KILL="RANK PHASE COUNT" in
the environment. A phase is a method of `pretrain.checkpoint.disk_store.DiskStore`; the process gets SIGKILL at the
COUNT-th call, before it or, with PHASE+, after it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any

from common.errors import run_main
from pretrain.checkpoint.disk_store import DiskStore
from pretrain.train import main


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(method: str, after: bool, count: int) -> None:
    original = getattr(DiskStore, method)
    calls = 0

    def counted(self: DiskStore, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            end()
        out = original(self, *args)
        if calls == count and after:
            end()
        return out

    @contextlib.contextmanager
    def writing(self: DiskStore, *args: Any):
        nonlocal calls
        calls += 1
        with original(self, *args) as stream:
            if calls == count:
                stream.write(b"half")
                stream.flush()
                end()
            yield stream

    setattr(DiskStore, method, writing if method == "write" else counted)


def run(arguments: list[str]) -> int:
    rank, phase, count = os.environ.get("KILL", "-1 begin 1").split()
    if os.environ.get("RANK", "0") == rank:
        arm(phase.rstrip("+"), phase.endswith("+"), int(count))
    sys.argv[1:] = arguments
    return run_main(main)
