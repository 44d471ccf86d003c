"""Objective: one self-supervised method. A new one is one file in `pretrain/objectives/` (or any .py file that a recipe names) and one recipe.

The file holds a docstring, a `Config` dataclass and one class that derives from `Objective`. Nothing is registered: `find` looks for the file.
`config_class` reads `Config` out of the source without running the rest, so that a recipe is checked before torch is imported; for that,
`Config` may use only what the file imports from dataclasses, typing, pretrain.config and pretrain.schedules.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config import ConfigError, Section
from pretrain.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pretrain.models.layers import Backbone
    from pretrain.objectives.base import Objective
    from pretrain.recipe import Recipe

FOLDER = Path(__file__).parent / "objectives"
LIGHT = ("__future__", "dataclasses", "typing", "pretrain.config", "pretrain.schedules")


def names() -> list[str]:
    """The names of all objectives that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "base"))


def _path(name: str, where: str = "") -> Path:
    path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
    if not path.is_file() or path.stem in ("__init__", "base"):
        what = "no such file" if name.endswith(".py") else f"no such objective; {nearest(name, names())}"
        raise ConfigError(f"{where}objective.name = {name!r}: {what}")
    return path


def purpose(name: str) -> str:
    """The first line of the objective's docstring."""
    return (ast.get_docstring(ast.parse(_path(name).read_text())) or "").partition("\n")[0]


def config_class(name: str, where: str = "") -> tuple[type[Section], dict]:
    """(the `Config` of an objective, no preset values), without importing torch."""
    path = _path(name, where)
    try:
        body = ast.parse(path.read_text()).body
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}") from None
    light: list[ast.stmt] = [
        node
        for node in body
        if (isinstance(node, ast.ImportFrom) and node.module in LIGHT)
        or (isinstance(node, ast.ClassDef) and node.name == "Config")
    ]
    module = types.ModuleType(f"{path.stem}.config")
    sys.modules[module.__name__] = module  # dataclasses look the module up by its name
    exec(compile(ast.Module(light, type_ignores=[]), str(path), "exec"), module.__dict__)
    if not (isinstance(getattr(module, "Config", None), type) and issubclass(module.Config, Section)):
        raise ConfigError(f"{path}: has no `@dataclass class Config(Section)`")
    return module.Config, {}


def find(name: str) -> type[Objective]:
    """The class of an objective, by its name or by the path of its file."""
    from pretrain.objectives.base import Objective

    path = _path(name)
    if path.parent == FOLDER:
        module: Any = importlib.import_module(f"pretrain.objectives.{path.stem}")
    else:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Objective) and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"{path}: holds {len(classes)} classes that derive from Objective, but one file is one method"
        )
    return classes[0]


def views(objective: Objective, recipe: Recipe, body: Backbone) -> Callable[..., dict]:
    """What makes one sample's part of a batch, for a backbone. Raises ConfigError for sizes that do not fit it."""
    try:
        return type(objective).views(recipe.objective, body.image_size, body.patch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
