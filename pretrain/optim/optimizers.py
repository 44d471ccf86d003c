"""Finds optimizers by name. A new one is one file in `pretrain/optim/`, and `optim.name` is the file's name; there is
no registry.

The file holds one class that derives from `Skippable`, and `build(groups, cfg) -> Skippable`: `groups` come from
`groups.parameter_groups`, `cfg` is the recipe's `Optim`. This module imports torch only inside functions, because
`optim.name` is checked before torch is imported.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.optim.skippable import Skippable

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The files of this folder that define `build`."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef build(" in path.read_text())


def find(name: str) -> ModuleType:
    """The optimizer's file as a module."""
    return importlib.import_module(f"pretrain.optim.{name}")


def kind(name: str) -> type[Skippable]:
    """The class in the optimizer's file."""
    from pretrain.optim.skippable import Skippable

    file = find(name)
    own = (c for c in vars(file).values() if isinstance(c, type) and c.__module__ == file.__name__)
    (out,) = (c for c in own if issubclass(c, Skippable))
    return out
