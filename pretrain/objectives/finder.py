"""Finds objectives by name. A new method is one file in `pretrain/objectives/` (or any .py file that a recipe names)
and one recipe.

The file holds a docstring, a `Config` dataclass and one class that derives from `Objective`; there is no registry.
A user's file is executed only if the user gave its path, or a recipe that names it. A recipe that is stored with a run
or an export is read by `recipe.stored`, which never executes such a file. `config_class` executes only `Config` and
what it needs from the source, so that a recipe is checked before torch is imported. `Config` may therefore use only
imports from the modules in LIGHT, and functions, classes and constants of the file that do the same.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import ConfigError
from common.errors import nearest
from pretrain.objectives.options import Options

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

FOLDER = Path(__file__).parent
LIGHT = (
    "__future__",
    "math",
    "dataclasses",
    "typing",
    "common.config",
    "common.schedules",
    "pretrain.objectives.options",
)
# modules by (name, source): executed once, as another process can only name a class that is the one in sys.modules
_modules: dict[tuple[str, str], types.ModuleType] = {}
NO_METHODS = ("__init__", "base", "finder", "options")  # files of the folder that hold no objective


def names() -> list[str]:
    """The names of all objectives that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_METHODS)


def path_of(name: str, where: str = "") -> Path:
    if is_file(name):
        path, what = Path(name), "no such file"
        found = path.is_file() and path.stem not in NO_METHODS
    else:
        path, what = FOLDER / f"{name}.py", f"no such objective; {nearest(name, names())}"
        found = name in names()
    if not found:
        raise ConfigError(f"{where}objective.name = {name!r}: {what}")
    return path


def is_file(name: str) -> bool:
    """Whether an objective's name is the path of a user's file rather than one of `names()`."""
    return name.endswith(".py")


@dataclass
class Unopened(Options):
    """Takes the place of the `Config` of an objective file that is not executed; it has no options."""


def unopened(name: str, where: str = "") -> tuple[type[Options], dict]:
    """Like `config_class`, but returns `Unopened` for a user's file, which is not read."""
    return (Unopened, {}) if is_file(name) else config_class(name, where)


def purpose(name: str) -> str:
    """The first line of the objective's docstring."""
    return (ast.get_docstring(ast.parse(path_of(name).read_text())) or "").partition("\n")[0]


def config_class(name: str, where: str = "") -> tuple[type[Options], dict]:
    """(the `Config` class of an objective, {}: objectives have no preset values), without importing torch."""
    path = path_of(name, where)
    source = path.read_text()
    try:
        light = _light(ast.parse(source).body)
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}") from None
    module = types.ModuleType(f"unlabeled_objective_config_{path.stem}")  # no other module has it; no dot, for pickle
    module.__file__ = str(path)  # where the comments at its options stand (common/explain.py)
    try:
        module = _once(
            module, source, lambda: exec(compile(ast.Module(light, type_ignores=[]), str(path), "exec"), vars(module))
        )
    except NameError as error:
        allowed = ", ".join(LIGHT[1:])
        raise ConfigError(
            f"{path}: Config uses {error.name}; it is read before torch is imported,"
            f" so it may use only what comes from {allowed}"
        ) from None
    if not (isinstance(getattr(module, "Config", None), type) and issubclass(module.Config, Options)):
        raise ConfigError(
            f"{path}: has no `@dataclass class Config(Options)`; import Options from pretrain.objectives.options"
        )
    return module.Config, {}


def _once(module: types.ModuleType, source: str, execute: Callable[[], object]) -> types.ModuleType:
    """The module that was executed for this file and source, or else `module`, executed now; also in `sys.modules`,
    where dataclasses and pickle look for it."""
    key = (f"{module.__name__} {module.__file__}", source)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = _modules.get(key, module)
    if key not in _modules:
        try:
            execute()
        except BaseException:
            sys.modules.pop(module.__name__) if before is None else sys.modules.update({module.__name__: before})
            raise
        _modules[key] = module
    return _modules[key]


def attributes(name: str) -> set[str]:
    """The attributes that an objective's file reads outside of its `Config`. The options among them are read in some
    step, whichever branch the first step takes."""
    body = ast.parse(path_of(name).read_text()).body
    nodes = (node for part in body if getattr(part, "name", "") != "Config" for node in ast.walk(part))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def _light(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of an objective's file that its `Config` needs: imports of light modules, and all names it uses,
    also indirectly."""
    named: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            named[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    wanted, used = ["Config"], set[ast.stmt]()
    while wanted:
        statement = named.get(wanted.pop())
        if statement is not None and statement not in used:
            used.add(statement)
            wanted += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]

    def is_light(node: ast.stmt) -> bool:
        if isinstance(node, ast.Import):
            return all(alias.name in LIGHT for alias in node.names)
        return isinstance(node, ast.ImportFrom) and node.module in LIGHT

    return [node for node in body if node in used or is_light(node)]


def find(name: str) -> type[Objective]:
    """The class of an objective, by its name or by the path of its file."""
    from pretrain.objectives.base import Objective

    path = path_of(name)
    if path.parent == FOLDER:
        module: Any = importlib.import_module(f"pretrain.objectives.{path.stem}")
    else:
        spec = importlib.util.spec_from_file_location(f"unlabeled_objective_{path.stem}", path)
        assert spec and spec.loader
        module, loader = importlib.util.module_from_spec(spec), spec.loader
        try:
            module = _once(module, path.read_text(), lambda: loader.exec_module(module))
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{path}: imports {error.name}, which is not installed; if it lies beside the file,"
                f" set PYTHONPATH={path.resolve().parent}"
            ) from None
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Objective) and c.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"{path}: holds {len(classes)} classes that derive from Objective; write exactly one class in each file"
        )
    return classes[0]
