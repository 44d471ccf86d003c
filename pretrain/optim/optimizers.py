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
    from pretrain.optim.skippable_optimizer import Skippable

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the optimizers: the files of this folder that define `build`."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef build(" in path.read_text())


def find(name: str) -> ModuleType:
    """The optimizer's file as a module."""
    return importlib.import_module(f"pretrain.optim.{name}")


def optimizer_class(name: str) -> type[Skippable]:
    """The class that the optimizer's file defines."""
    from pretrain.optim.skippable_optimizer import Skippable

    module = find(name)
    defined_here = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    (optimizer,) = (c for c in defined_here if issubclass(c, Skippable))
    return optimizer
