"""Which nodes of a job are left out, and where its guards run, when nodes fail in ways that a real cluster cannot be made
to show: a script stands for `srun`. tests/launch/test_slurm.py has the checks on a real one."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launch import collective_check, guards, usable_nodes
from launch.clusters import Cluster

# `first` is the node of rank 0, and `answer` prints what it finds
SRUN = """#!/bin/sh
first=${{CHECKED_NODES%%,*}}
echo "$CHECKED_NODES" >> {folder}/checks
answer() {{ echo "collective check: $1"; }}
{does}
"""
LOUD = """
head -c 200000 /dev/zero | tr '\\0' 'x' >&2
echo 'NCCL version 2.27.3+cuda12.9'
case $CHECKED_NODES in *n2*) answer '{"n2": "x"}';; *) answer {};; esac
exec sleep 60
"""
FIRST_UNREACHABLE = """
case $CHECKED_NODES in
n1,*) answer '{"n2": "absent", "n3": "absent", "n4": "absent"}';;
*n1*) answer '{"n1": "absent"}';;
*) answer {};;
esac
"""
SLOW_AT_FIRST = (
    """[ -e slow ] && answer {} || { touch slow; answer '{"n2": "absent", "n3": "absent", "n4": "absent"}'; }"""
)
NOT_AS_RANK_0 = """[ $first = n1 ] && exit 1; answer {}"""
TWO_OF_FOUR = """case $CHECKED_NODES in *n4*) answer '{"n3": "absent", "n4": "absent"}';; *) answer {};; esac"""
ONE_AFTER_THE_OTHER = """
case $CHECKED_NODES in *n2*) answer '{"n2": "x"}';; *n3*) answer '{"n3": "y"}';; *) answer {};; esac
"""
ONE_OF_TWO_HANGS = """[ $first = n2 ] && exit 1; answer '{"n2": "absent"}'"""
NO_LINK = """[ $first = n1 ] && answer '{"n2": "absent"}' || answer '{"n1": "absent"}'"""
NO_ANSWER = "echo 'no library' >&2; exit 1"
ALL_HANG = """answer '{"n1": "hung", "n2": "hung", "n3": "hung"}'"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("nodes", "does", "bad", "checks"),
    [
        ("n1 n2 n3", LOUD, "n2", 2),
        ("n1 n2 n3 n4", FIRST_UNREACHABLE, "n1", 3),
        ("n1 n2 n3 n4", SLOW_AT_FIRST, "", 3),
        ("n1 n2 n3", NOT_AS_RANK_0, "n1", 4),
        ("n1 n2 n3 n4", TWO_OF_FOUR, "n3 n4", 4),
        ("n1 n2 n3 n4 n5 n6", ONE_AFTER_THE_OTHER, "n2 n3", 3),
        ("n1 n2", ONE_OF_TWO_HANGS, "n2", 2),
        ("n1 n2", NO_LINK, "n2", 2),
        ("n1 n2 n3", NO_ANSWER, "", 3),
        ("n1 n2 n3", ALL_HANG, "", 3),
    ],
)
def test_which_nodes_are_left_out(
    nodes: str, does: str, bad: str, checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script(tmp_path / "bin" / "srun", SRUN.format(folder=tmp_path, does=does))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(usable_nodes.rendezvous, "environment", lambda first: {**os.environ})
    monkeypatch.setattr(usable_nodes.NodeChecks, "_problems_of_each", lambda self, nodes: {})
    monkeypatch.setattr(usable_nodes, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(usable_nodes, "GRACE_SECONDS", 0.5)
    said: list[str] = []
    found = usable_nodes.NodeChecks(Cluster(), tmp_path, tmp_path, said.append, lambda: False).problems(nodes.split())
    assert [*found] == bad.split(), found
    assert len((tmp_path / "checks").read_text().splitlines()) == checks
    assert bool(said) == (does in (NO_ANSWER, ALL_HANG))
    assert does != NO_ANSWER or said[0].endswith("which one is the cause: no library")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def hangs() -> Iterator[threading.Event]:
    """An event on which threads wait until the end of a test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.slow
def test_rank_0_answers_although_its_all_reduce_hangs(hangs: threading.Event, monkeypatch: pytest.MonkeyPatch):
    """As in `ncclCommInit`, which has no time limit. The other rank fails in the meantime."""

    def all_reduce(dist: Any, store: Any, rank: int, *_: object) -> None:
        if rank == 0:
            hangs.wait(60)
            sys.exit()  # of the thread
        raise RuntimeError("the connection was closed")

    monkeypatch.setattr(collective_check, "_all_reduce", all_reduce)
    address, names = ("127.0.0.1", free_port()), ["n1", "n2"]
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda rank: collective_check.check(rank, names, address, 0, 2.0), range(2))]
    assert found == [{"n1": "joined the other nodes, but did not complete an all-reduce with them"}, None]


def test_a_rank_that_does_not_join_is_named():
    found = collective_check.check(0, ["n1", "n2"], ("127.0.0.1", free_port()), 0, 1.0)
    assert found == {"n2": "did not join the other nodes in 0.6 s"}


# ---------------------------------------------------------------- guards
def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_guards_run_on_nodes_that_passed_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each is a step of its own; in place of one that ends, another one is started, also during an attempt."""
    script(tmp_path / "bin" / "srun", '#!/bin/sh\ncase "$*" in *n3*) exit 1;; esac\nexec sleep 60\n')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    said: list[str] = []
    made = guards.Guards(Cluster(), tmp_path / "beat", tmp_path, said.append)
    try:
        made.use(["n2", "n3", "n4", "n5"])
        assert {node: number for node, (number, _) in made.running.items()} == {"n2": 0, "n3": 1, "n4": 2}
        wait_until(lambda: made.running["n3"][1].poll() is not None)
        made.renew()
        assert {node: number for node, (number, _) in made.running.items()} == {"n2": 0, "n4": 2, "n5": 1}
        assert said == ["the process on n3 that watches for the loss of this node has ended: 1"]
        dropped, kept = made.running["n4"][1], made.running["n2"][1]
        made.use(["n2", "n3", "n5"])  # n4 has failed the check
        assert dropped.poll() is not None and kept.poll() is None
        assert [*made.running] == ["n2", "n5"]  # n3 has just ended, and is not started again and again
        monkeypatch.setattr(guards, "AGAIN_SECONDS", 0.0)
        made.renew()
        assert [*made.running] == ["n2", "n5", "n3"]
    finally:
        made.use([])
    assert made.running == {}
