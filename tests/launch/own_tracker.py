"""A tracker that writes to FOLDER/stored.jsonl, in place of a package. `python -m tests.launch.own_tracker RUN NAME` is
the process that sends to it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import child_signals
from pretrain.trackers import sender, trackers

SECONDS = "OWN_TRACKER_SECONDS"  # environment variable: how long each call takes
LAST_SECONDS = "OWN_TRACKER_LAST_SECONDS"  # environment variable: `sender.LAST_SECONDS`


class Run:
    def __init__(self, options: Any, folder: Path, run_id: str):
        self.path, self.id = folder / "stored.jsonl", run_id or "1"

    def add_settings(self, settings: dict[str, Any]) -> None:
        pass

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        time.sleep(float(os.environ.get(SECONDS, 0)))
        for step, values in rows:
            self.write({"step": step, **values})

    def close(self, outcome: str) -> None:
        self.write({"outcome": outcome})

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    trackers.find = lambda name: SimpleNamespace(Run=Run)  # type: ignore[assignment,return-value]
    sender.LAST_SECONDS = float(os.environ.get(LAST_SECONDS, 60))
    sender.POLL_SECONDS = 0.1
    child_signals.ignore()
    sys.exit(sender.main(Path(sys.argv[1]), sys.argv[2]))
