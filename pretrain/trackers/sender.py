"""Sends the metrics and scores of a run to one of its trackers: `python -m pretrain.trackers.sender RUN NAME`, until
its standard input is closed, or has a line with the outcome of the run and the seconds that are left.

It reads metrics.jsonl and results.jsonl while the run writes them. So it cannot slow the training down, whatever the
tracker does, and what a tracker could not take is sent later. RUN/trackers/NAME/state.json holds the id of the run in
the tracker, and how far it has got: nothing is sent twice, also when a run resumes from an earlier checkpoint. This
module does not import torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from common import child_signals, config
from common.appended_lines import LineFile
from common.errors import DataError, UserError, run_main
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
from pretrain.run_folder.written_files import LOCK, MARKER, TRACKER_STATE, TRACKERS
from pretrain.trackers import trackers

POLL_SECONDS = 2.0  # between two looks at the files
RETRY_SECONDS = 60.0  # after an error of the tracker
LOCK_SECONDS = 300.0  # after this wait for another process that sends the same run, a line is logged
# The sender ends itself this time after the end of the run, because its parent may have been killed.
LAST_SECONDS = 600.0
SENDING_SHARE = 0.8  # of the seconds that are left: no request begins later, because it would be cut off and repeated
# An entry is refused if it fails this often, and a later one is accepted. Fewer failures may be those of the network.
REFUSALS = 3
MAX_PROBES = 20  # later entries that are tried then
EXIT_UNSENT = 1  # exit code if something was not sent
SECRET_WORDS = ("KEY", "TOKEN", "PASSWORD", "SECRET")  # in names of environment variables whose values are secrets
MIN_SECRET = 6  # characters; a shorter value would also be found inside of words


class Ending:
    """When and how the parent process ends this one."""

    def __init__(self) -> None:
        self.outcome = trackers.FAILED  # of the run, if the parent is killed and says nothing
        self.deadline = math.inf  # no request begins later (time.monotonic)
        self.told = threading.Event()  # whether the parent has ended, or told the outcome

    def watch(self) -> None:
        """Wait in a thread until standard input has a line or is closed. LAST_SECONDS later end this process, in which
        a tracker may hang."""
        threading.Thread(target=self._watch, name="ending", daemon=True).start()

    def _watch(self) -> None:
        seconds = LAST_SECONDS
        with contextlib.suppress(OSError, ValueError):  # not two words: the parent was killed
            self.outcome, number = sys.stdin.readline().split()
            seconds = float(number)
        self.deadline = time.monotonic() + SENDING_SHARE * seconds
        self.told.set()
        time.sleep(LAST_SECONDS)
        os._exit(EXIT_UNSENT)


class Entry(NamedTuple):
    """The values of a step that wait."""

    step: int
    values: dict[str, float]
    state_after: dict[str, int]  # entries of state.json once they are sent


class Sender:
    """Sends the rows of one run to one tracker. `folder`: RUN/trackers/NAME, whose lock this process holds."""

    def __init__(self, run: Path, recipe: Recipe, options: Tracker, folder: Path, ending: Ending):
        self.run, self.options, self.settings = run, options, config.to_dict(recipe)
        self.folder, self.ending = folder, ending
        self.identity = run_identity(run)["id"]
        self.log = LineFile(run / "log.txt")
        self.tracker: trackers.OpenRun | None = None
        self.failed = False  # whether the last attempt has failed
        self.next_attempt = 0.0  # earliest time of the next one
        self.one_by_one = 0  # number of entries that are sent alone, because they have failed together
        self.failures = 0  # of the first entry, sent alone
        self._begin(self._read_state())

    def _begin(self, state: dict[str, Any]) -> None:
        """Send everything that is not in this state."""
        self.state = state
        self.last_read = {"step": state["step"], "scores": state["scores"]}
        self.metrics, self.results = NewRows(self.run / "metrics.jsonl"), NewRows(self.run / "results.jsonl")
        self.unfinished_group: list[dict[str, Any]] = []  # rows of a group whose last row has not been read yet
        self.rows_of_results = 0  # that were read
        self.waiting: deque[Entry] = deque()

    def _new_state(self) -> dict[str, Any]:
        """{"run", "id", "step", "scores", "outcome"}: identity of the run, its id in the tracker, the last step and the
        number of rows of results.jsonl that were sent, and how the run has ended."""
        return {"run": self.identity, "id": "", "step": -1, "scores": 0, "outcome": trackers.FINISHED}

    def _read_state(self) -> dict[str, Any]:
        new = self._new_state()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = new | loads(read_text(self.folder / TRACKER_STATE))  # earlier versions stored no outcome
            if {key: type(found[key]) for key in new} == {key: type(new[key]) for key in new}:
                return found if found["run"] == self.identity else new
        return new

    def say(self, line: str) -> None:
        _log(self.log, self.options.name, line)

    def read(self) -> None:
        """Add what the run has written since the last call to `waiting`."""
        rows = self.metrics.read()
        if self.metrics.replaced:
            self.unfinished_group = []
        for row in rows:
            self.unfinished_group.append(row)
            if "samples_per_second" not in row:  # only the last row of a group has it
                continue
            if row["step"] > self.last_read["step"]:
                for step, values in scalars(self.unfinished_group).items():
                    if step > self.last_read["step"]:
                        self.waiting.append(Entry(step, values, {"step": step}))
                self.last_read["step"] = row["step"]
            self.unfinished_group = []
        rows = self.results.read()
        if self.results.replaced:
            self.rows_of_results = 0
        for row in rows:
            self.rows_of_results += 1
            if self.rows_of_results > self.last_read["scores"]:
                self.last_read["scores"] = self.rows_of_results
                if row["model"] not in BASELINES:
                    state_after = {"scores": self.rows_of_results}
                    self.waiting.append(Entry(row["step"], {score_name(row): row["value"]}, state_after))

    def send(self, now: bool = False) -> None:
        """Send what waits, unless the tracker has failed less than RETRY_SECONDS ago; with `now`, in any case."""
        time_now = time.monotonic()
        if not self.waiting or time_now > self.ending.deadline or (time_now < self.next_attempt and not now):
            return
        try:
            tracker = self._open()
            while self.waiting and time.monotonic() < self.ending.deadline:
                if self.one_by_one:
                    self._send_alone(tracker)
                else:
                    self._send_together(tracker)
                if self.failed:
                    self.say("works again")
                self.failed = False
        except (Exception, SystemExit) as error:  # of the tracker, which must not end the process
            self._check_not_overwritten()
            if not self.failed:
                self.say(f"{_described(error)}; it is tried again, and the training goes on")
            self.failed, self.next_attempt = True, time.monotonic() + RETRY_SECONDS
            self.tracker = None

    def _send_together(self, tracker: trackers.OpenRun) -> None:
        """Send the first entries, with at most MAX_VALUES values."""
        sums = itertools.accumulate(len(entry.values) for entry in self.waiting)
        number = max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= trackers.MAX_VALUES, sums)))
        self.one_by_one = number  # unless this succeeds
        tracker.log([(entry.step, entry.values) for entry in itertools.islice(self.waiting, number)])
        self._remove(number)
        self.one_by_one = 0

    def _send_alone(self, tracker: trackers.OpenRun) -> None:
        """Send the first entry. If the tracker, which could be opened, has refused it REFUSALS times, leave it out as
        soon as a later entry is accepted."""
        refusals: list[tuple[Entry, BaseException]] = []
        for entry in itertools.islice(self.waiting, MAX_PROBES):
            try:
                tracker.log([(entry.step, entry.values)])
            except (Exception, SystemExit) as error:
                self.failures += not refusals
                refusals.append((entry, error))
                if self.failures < REFUSALS or time.monotonic() > self.ending.deadline:
                    raise
                continue
            for refused, reason in refusals:
                names = ", ".join(refused.values)
                self.say(f"refuses {names} of step {refused.step}, which is left out: {_described(reason)}")
            self._remove(len(refusals) + 1)
            self.one_by_one, self.failures = max(0, self.one_by_one - len(refusals) - 1), 0
            return
        raise refusals[0][1]

    def _remove(self, number: int) -> None:
        """The first entries are sent or left out."""
        for _ in range(number):
            self.state |= self.waiting.popleft().state_after
        self._write_state()

    def _open(self) -> trackers.OpenRun:
        if self.tracker is None:
            options = self.options
            folder = Path(options.folder).absolute() if options.folder else self.folder.absolute()
            folder.mkdir(parents=True, exist_ok=True)
            named = options.replace(run=options.run or self.run.absolute().name)
            opened = trackers.find(options.name).Run
            try:
                self.tracker = opened(named, folder, self.state["id"])
            except trackers.UnknownRun as error:
                self.say(f"{error}; everything is sent to a new run")
                self._begin(self._new_state())
                self.read()
                self.tracker = opened(named, folder, "")
            self.state["id"] = self.tracker.id
            self._write_state()
            settings = {key: value for key, value in leaves(self.settings) if value not in (None, "", [])}
            try:
                self.tracker.add_settings(settings)
            except (Exception, SystemExit) as error:
                self.say(f"has not stored the recipe: {_described(error)}")
        return self.tracker

    def _check_not_overwritten(self) -> None:
        """Raises UserError if the run has another identity by now."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it cannot be read at the moment
            if loads(read_text(self.run / MARKER))["id"] != self.identity:
                raise UserError(f"{self.run}: was overwritten")

    def _write_state(self) -> None:
        self._check_not_overwritten()
        with contextlib.suppress(OSError, DataError):  # the disk is full: the next call tries again
            write_atomically(str(self.folder / TRACKER_STATE), [json.dumps(self.state).encode()])

    def finish(self) -> int:
        """Send what is left, and close the run in the tracker. Returns the exit code."""
        self.read()
        for _ in range(1 + REFUSALS):
            self.send(now=True)
        if self.ending.outcome != trackers.UNCHANGED:
            self.state["outcome"] = self.ending.outcome
        self._write_state()
        try:
            if self.tracker is not None:
                self.tracker.close(self.state["outcome"])
        except (Exception, SystemExit) as error:
            self.say(_described(error))
            self.failed = True
        if self.waiting:
            self.say(f"{len(self.waiting)} entries were not sent; the same command sends them")
        return EXIT_UNSENT if self.waiting or self.failed else 0


def _log(file: LineFile, name: str, line: str) -> None:
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} tracker {name}: {without_secrets(line)}"
    file.add(printable(text) + "\n")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def without_secrets(text: str) -> str:
    """The text, in which the values of environment variables with secrets are replaced by ***."""
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET and any(word in name.upper() for word in SECRET_WORDS):
            text = text.replace(value, "***")
    return text


def main(run: Path, name: str) -> int:
    ending = Ending()
    ending.watch()
    recipe = stored(run)
    options = next(one for one in recipe.log.trackers if one.name == name)
    folder, lock, began = run / TRACKERS / name, Lock(), time.monotonic()
    sender: Sender | None = None
    ended = False
    while not ended:
        ended = ending.told.wait(POLL_SECONDS)
        if sender is None:
            with contextlib.suppress(UserError, OSError):  # another process sends this run, or the disk is full
                folder.mkdir(parents=True, exist_ok=True)
                if lock.run is None:
                    lock.take(folder)
                sender = Sender(run, recipe, options, folder, ending)
            if sender is None and time.monotonic() > began + LOCK_SECONDS:
                began = math.inf
                line = f"waits: another process sends this run, or {folder / LOCK} is not writable"
                _log(LineFile(run / "log.txt"), name, line)
        if sender is not None and not ended:
            sender.read()
            sender.send()
    code = sender.finish() if sender is not None else 0
    lock.release()
    os._exit(code)  # without waiting for threads of the tracker


if __name__ == "__main__":
    child_signals.ignore()  # the process that trains handles signals, and closes standard input
    os.nice(10)
    sys.exit(run_main(lambda: main(Path(sys.argv[1]), sys.argv[2])))
