"""Finds trackers by name. A tracker is a service or a local store that shows the metrics of runs, in addition to
TensorBoard. A new one is one file in `pretrain/trackers/`, and `log.trackers` names that file; there is no registry.

The file holds `PACKAGES`, the names of the modules that it needs, and a class `Run`, see `OpenRun`. It imports these
modules only when a run is opened. Trackers are called in a process of their own (`sender.py`), never by the trainer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from common.errors import UserError

FOLDER = Path(__file__).parent
MAX_VALUES = 1000  # that are sent together; MLflow allows no more in a request
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # how a run has ended
UNCHANGED = "unchanged"  # scores were sent after the end of the run


class UnknownRun(Exception):
    """The tracker does not have the run with the given id (any longer)."""


class OpenRun(Protocol):
    """The class `Run` of a tracker's file: one run, open for writing. Every method may raise any exception."""

    id: str  # with which the tracker continues the run later

    def __init__(self, options: Any, folder: Path, run_id: str) -> None:
        """Open the run that has the id `run_id`, or a new one if it is "". Raises UnknownRun if there is no such run:
        then a new one is opened, which gets everything from the first step on.

        `options`: an entry of `log.trackers`; nothing may be sent anywhere if its `server` is "". `folder`: where local
        files belong; it exists.
        """

    def add_settings(self, settings: dict[str, Any]) -> None:
        """Add the values of the recipe, by dotted key. This is called once after the run was opened. An error is
        logged, and the run goes on."""

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Add the values of some steps, at most MAX_VALUES together unless a single row has more. They count as sent
        when this returns, although the package may only have queued them. Scores come later than metrics of later
        steps."""

    def close(self, outcome: str) -> None:
        """Write everything that is waiting, and mark the run as ended: FINISHED, STOPPED or FAILED."""


def names() -> list[str]:
    """The names of the trackers: the files of this folder that define `Run`."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\nclass Run:" in path.read_text())


def find(name: str) -> ModuleType:
    """The tracker's file as a module."""
    return importlib.import_module(f"pretrain.trackers.{name}")


def check(chosen: Iterable[str]) -> None:
    """Raises UserError if a package that one of these trackers needs is not installed."""
    for name in chosen:
        if missing := [module for module in find(name).PACKAGES if importlib.util.find_spec(module) is None]:
            raise UserError(
                f"log.trackers = {name}: {', '.join(missing)} is not installed: pip install 'unlabeled[{name}]', or"
                f" leave {name} out"
            )
