"""Sends the metrics and scores of a run to one of its trackers: `python -m pretrain.trackers.sender RUN NAME`, until
its standard input is closed.

It reads metrics.jsonl and results.jsonl while the run writes them. So it cannot slow the training down, whatever the
tracker does, and what a tracker could not take is sent later. RUN/trackers/NAME/state.json holds the id of the run in
the tracker, and how far it has got: nothing is sent twice, also when a run resumes from an earlier checkpoint. This
module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from common import child_signals, config
from common.errors import UserError, run_main
from common.line_file import LineFile
from common.output import printable
from common.untrusted import loads, read_text
from common.yaml_values import leaves
from data_pipeline.storage.urls import write_atomically
from pretrain.recipes.recipe import Recipe, stored
from pretrain.recipes.sections import Tracker
from pretrain.run_folder.jsonl_rows import NewRows
from pretrain.run_folder.marker import run_identity
from pretrain.run_folder.run_lock import Lock
from pretrain.run_folder.scalars import BASELINES, scalars, score_name
from pretrain.run_folder.written_files import TRACKER_STATE, TRACKERS
from pretrain.trackers import trackers

POLL_SECONDS = 2.0  # between two looks at the files
RETRY_SECONDS = 60.0  # after an error of the tracker
LAST_SECONDS = 600.0  # after the end of the run, in which nobody may be left to end a tracker that hangs
EXIT_UNSENT = 1  # exit code if something was not sent
SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET")  # in the names of environment variables whose values are secrets
MIN_SECRET = 6  # characters; a shorter value would also be found inside of words


class Sender:
    """Sends the rows of one run to one tracker. `folder`: RUN/trackers/NAME, whose lock this process holds."""

    def __init__(self, run: Path, recipe: Recipe, options: Tracker, folder: Path):
        self.run, self.options, self.settings, self.own = run, options, config.to_dict(recipe), folder
        self.identity = run_identity(run)["id"]
        self.tracker: trackers.OpenRun | None = None
        self.metrics, self.results = NewRows(run / "metrics.jsonl"), NewRows(run / "results.jsonl")
        self.write: list[dict[str, Any]] = []  # rows of a write to metrics.jsonl of which the last one has not come
        self.waiting: deque[tuple[int, dict[str, float], dict[str, int]]] = deque()  # (step, values, state after it)
        self.rows_of_results = 0  # that were read
        self.state = self._read_state()
        self.seen = {"step": self.state["step"], "scores": self.state["scores"]}
        self.failed = False  # whether the last attempt has failed
        self.next = 0.0  # earliest time of the next attempt

    def _read_state(self) -> dict[str, Any]:
        """{"run", "id", "step", "scores"}: identity of the run, its id in the tracker, the last step and the number of
        rows of results.jsonl that were sent."""
        new = {"run": self.identity, "id": "", "step": -1, "scores": 0}
        with contextlib.suppress(OSError, ValueError):
            known = loads(read_text(self.own / TRACKER_STATE))
            if {key: type(known[key]) for key in new} == {key: type(new[key]) for key in new}:
                return known if known["run"] == self.identity else new
        return new

    def say(self, line: str) -> None:
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} tracker {self.options.name}: {without_secrets(line)}"
        LineFile(self.run / "log.txt").add(printable(text) + "\n")

    def read(self) -> None:
        """Add what the run has written since the last call to `waiting`."""
        rows = self.metrics.read()
        if self.metrics.replaced:
            self.write = []
        for row in rows:
            self.write.append(row)
            if "samples_per_second" not in row:  # only the last row of a write has it
                continue
            if row["step"] > self.seen["step"]:
                for step, values in scalars(self.write).items():
                    if step > self.seen["step"]:
                        self.waiting.append((step, values, {"step": step}))
                self.seen["step"] = row["step"]
            self.write = []
        rows = self.results.read()
        if self.results.replaced:
            self.rows_of_results = 0
        for row in rows:
            self.rows_of_results += 1
            if self.rows_of_results > self.seen["scores"]:
                self.seen["scores"] = self.rows_of_results
                if row["model"] not in BASELINES:
                    done = {"scores": self.rows_of_results}
                    self.waiting.append((row["step"], {score_name(row): row["value"]}, done))

    def send(self, now: bool = False) -> None:
        """Send what waits, unless the tracker has failed less than RETRY_SECONDS ago; with `now`, in any case."""
        if not self.waiting or (time.monotonic() < self.next and not now):
            return
        try:
            while self.waiting:
                step, values, done = self.waiting[0]
                self._open().log(step, values)
                self.waiting.popleft()
                self.state |= done
            if self.failed:
                self.say("works again; nothing was lost")
            self.failed = False
        except (Exception, SystemExit) as error:  # of the tracker, which must not end the process
            if not self.failed:
                self.say(f"{_described(error)}; it is tried again, and the training goes on")
            self.failed, self.next = True, time.monotonic() + RETRY_SECONDS
            self.tracker = None
        finally:
            self._write_state()

    def _open(self) -> trackers.OpenRun:
        if self.tracker is None:
            options = self.options
            folder = Path(options.folder).absolute() if options.folder else self.own.absolute()
            folder.mkdir(parents=True, exist_ok=True)
            named = options.replace(run=options.run or self.run.absolute().name)
            settings = {key: value for key, value in leaves(self.settings) if value not in (None, "", [])}
            self.tracker = trackers.find(options.name).Run(named, folder, self.state["id"], settings)
            self.state["id"] = self.tracker.id
            self._write_state()
        return self.tracker

    def _write_state(self) -> None:
        if run_identity(self.run)["id"] != self.identity:
            raise UserError(f"{self.run}: was overwritten")
        with contextlib.suppress(OSError):  # the disk is full: the next call tries again
            write_atomically(str(self.own / TRACKER_STATE), [json.dumps(self.state).encode()])

    def finish(self) -> int:
        """Send what is left, and close the run in the tracker. Returns the exit code."""
        self.read()
        self.send(now=True)
        try:
            if self.tracker is not None:
                self.tracker.close()
        except (Exception, SystemExit) as error:
            self.say(_described(error))
            self.failed = True
        if self.waiting:
            self.say(f"{len(self.waiting)} entries were not sent; the same command sends them")
        return EXIT_UNSENT if self.waiting or self.failed else 0


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def without_secrets(text: str) -> str:
    """The text, in which the values of environment variables with secrets are replaced by ***."""
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET and any(word in name.upper() for word in SECRETS):
            text = text.replace(value, "***")
    return text


def main(run: Path, name: str) -> int:
    recipe = stored(run)
    options = next(one for one in recipe.log.trackers if one.name == name)
    folder, lock, ended = run / TRACKERS / name, Lock(), False
    folder.mkdir(parents=True, exist_ok=True)
    sender: Sender | None = None
    while not ended:
        ended = child_signals.input_closed(POLL_SECONDS)
        if ended:
            threading.Timer(LAST_SECONDS, os._exit, (EXIT_UNSENT,)).start()
        if sender is None:
            with contextlib.suppress(UserError):  # the sender of another process has it, and sends the rows
                lock.take(folder)
                sender = Sender(run, recipe, options, folder)
        if sender is not None and not ended:
            sender.read()
            sender.send()
    code = sender.finish() if sender is not None else 0
    lock.release()
    os._exit(code)  # without waiting for threads of the tracker


if __name__ == "__main__":
    child_signals.ignore()  # the process that trains handles signals, and closes standard input
    sys.exit(run_main(lambda: main(Path(sys.argv[1]), sys.argv[2])))
