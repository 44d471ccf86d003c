"""The generator of hostile inputs (`tests/attack.py`) runs against the commands for a while: no traceback, no hang,
no file written elsewhere, bounded memory. UNLABELED_ATTACK_SECONDS makes it longer, UNLABELED_ATTACK_SEED sets the
first case. The process is watched from outside, so that a crash inside a library, or a hang that no signal ends, is
also reported with its case."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import attack
from tests.conftest import sampled

RUNS = {0: 20.0, 10_000: 120.0}  # {first case: seconds of cases}; `make test` has the first run
START = 300.0  # seconds until the first case, on a slow and busy machine


@pytest.mark.slow
@pytest.mark.parametrize("first", sampled(RUNS, 0))
def test_hostile_inputs(first: int, tmp_path: Path):
    seconds = os.environ.get("UNLABELED_ATTACK_SECONDS", str(RUNS[first]))
    seed = os.environ.get("UNLABELED_ATTACK_SEED", str(first))
    command = [
        sys.executable,
        "-m",
        "tests.attack",
        "--seconds",
        seconds,
        "--seed",
        seed,
        "--folder",
        str(tmp_path / "a"),
    ]
    said: list[str] = []
    lines: queue.SimpleQueue = queue.SimpleQueue()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        patience = START
        try:
            while (line := lines.get(timeout=patience)) is not None:
                said.append(line)
                if line.startswith("case "):
                    patience = 10 * attack.SECONDS  # a case gives several commands, each of which ends itself
        except queue.Empty:
            process.kill()
            said.append("it went on without a word, and was killed\n")
    cases = [line.split()[1] for line in said if line.startswith("case ")]
    last = f"the last case was {cases[-1]}: python -m tests.attack --only {cases[-1]}" if cases else "no case began"
    failed = "".join(line for line in said if not re.match(r"case \d+$", line))
    assert process.returncode == 0 and cases, f"exit code {process.returncode}; {last}\n{failed[-8000:]}"


def test_the_same_number_gives_the_same_case():
    """A case depends on its number only, so that a failure in CI can be repeated anywhere."""
    import random

    for make in (attack.image, attack.member, attack.value, attack.bomb):
        assert repr(make(random.Random(7))) == repr(make(random.Random(7)))
    assert attack.tar(random.Random(7), Path("/x")) == attack.tar(random.Random(7), Path("/x"))
