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


class OpenRun(Protocol):
    """The class `Run` of a tracker's file: one run, open for writing. Every method may raise any exception."""

    id: str  # with which the tracker continues the run later

    def __init__(self, options: Any, folder: Path, known: str, settings: dict[str, Any]) -> None:
        """Open the run that has the id `known`, or a new one if it is "".

        `options`: an entry of `log.trackers`; nothing may be sent anywhere if its `server` is "". `folder`: where local
        files belong; it exists. `settings`: the values of the recipe, by dotted key.
        """

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step. Scores come later than metrics of later steps."""

    def close(self) -> None:
        """Write everything that is waiting, and mark the run as ended."""


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
