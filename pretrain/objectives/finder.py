"""Finds objectives by name. A new method is one file in `pretrain/objectives/` (or any .py file that a recipe names)
and one recipe.

The file holds a docstring, a `Config` dataclass and one class that derives from `Objective`; there is no registry. A
user's file is executed only if the user has given its path, or a recipe that names it; `recipe.stored`, which reads the
recipe that is stored in a run or an export, never executes such a file. A recipe is checked before torch is imported.
Therefore `config_class` executes only `Config` and those functions, classes and constants of the file that it uses, and
all of these may only import from LIGHT_MODULES, or the `Config` of an objective that comes with the project.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, nearest
from pretrain.objectives.options import Options

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective

FOLDER = Path(__file__).parent
LIGHT_MODULES = (
    "__future__",
    "math",
    "dataclasses",
    "typing",
    "common.config",
    "common.schedules",
    "pretrain.objectives.options",
)
# Executed modules by (name, source). Each is executed once: pickle needs classes that are identical to those in
# sys.modules.
_modules: dict[tuple[str, str], types.ModuleType] = {}
OTHER_FILES = ("__init__", "base", "finder", "options")  # files in this folder that hold no objective


def names() -> list[str]:
    """The names of all objectives that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHER_FILES)


def path_of(name: str, where: str = "") -> Path:
    """The file of an objective, by its name or its path. Raises ConfigError that begins with `where`."""
    if is_file(name):
        path = Path(name)
        if path.is_file() and path.stem not in OTHER_FILES:
            return path
        raise ConfigError(f"{where}objective.name = {name!r}: no such file")
    known = names()
    if name not in known:
        raise ConfigError(f"{where}objective.name = {name!r}: no such objective; {nearest(name, known)}")
    return FOLDER / f"{name}.py"


def is_file(name: str) -> bool:
    """Whether an objective's name is the path of a user's file rather than one of `names()`."""
    return name.endswith(".py")


@dataclass
class NotExecuted(Options):
    """Replaces the `Config` of an objective's file that must not be executed; it has no options."""


def config_without_execution(name: str, where: str = "") -> tuple[type[Options], dict]:
    """Like `config_class`, but returns `NotExecuted` for a user's file, which is not read."""
    return (NotExecuted, {}) if is_file(name) else config_class(name, where)


def purpose(name: str) -> str:
    """The first line of the objective's docstring."""
    source = path_of(name).read_text()
    head = source.partition("\nfrom __future__ import")[0]  # parsing all files takes a fifth of `unlabeled recipes`
    return (ast.get_docstring(ast.parse(head)) or "").partition("\n")[0]


def config_class(name: str, where: str = "") -> tuple[type[Options], dict]:
    """(the `Config` class of an objective, {}: objectives have no preset values), without importing torch."""
    path = path_of(name, where)
    source = path.read_text()
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.msg}") from None
    # a unique name, also if a user's file has the name of an objective whose Config it imports; without a dot, for pickle
    owner = "unlabeled" if path.parent == FOLDER else "own"
    module = types.ModuleType(f"{owner}_objective_config_{path.stem}")
    module.__file__ = str(path)  # common/explain.py reads the comments of the options from this file
    vars(module).update(_imported_configs(body))
    code = compile(ast.Module(_needed_by_config(body), type_ignores=[]), str(path), "exec")
    try:
        module = _once(module, source, lambda: exec(code, vars(module)))
    except NameError as error:
        allowed = ", ".join(LIGHT_MODULES[1:])
        raise ConfigError(
            f"{path}: Config uses {error.name}; it is read before torch is imported,"
            f" so it may use only what comes from {allowed}, or a `Config` of pretrain.objectives"
        ) from None
    if not (isinstance(getattr(module, "Config", None), type) and issubclass(module.Config, Options)):
        raise ConfigError(
            f"{path}: has no `@dataclass class Config(Options)`; import Options from pretrain.objectives.options"
        )
    return module.Config, {}


def _imported_configs(body: list[ast.stmt]) -> dict[str, type[Options]]:
    """{name in the file: class} of each `from pretrain.objectives.NAME import Config [as …]`, which is not executed,
    because that module imports torch."""
    found = dict[str, type[Options]]()
    for node in body:
        package, _, other = (getattr(node, "module", None) or "").rpartition(".")
        if isinstance(node, ast.ImportFrom) and package == "pretrain.objectives" and other not in OTHER_FILES:
            found |= {a.asname or a.name: config_class(other)[0] for a in node.names if a.name == "Config"}
    return found


def _once(module: types.ModuleType, source: str, execute: Callable[[], object]) -> types.ModuleType:
    """Execute `module`, unless a module was executed before for the same file and source. Returns the executed one, and
    puts it into `sys.modules`, where dataclasses and pickle look for it."""
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
    """The names of all attributes that an objective's file, and those of the objectives from which it derives, read
    outside of their `Config`. The options among them are read in some step, even if the first step takes another
    branch."""
    from pretrain.objectives.base import Objective

    cls = find(name)
    bases = (base for base in cls.__mro__[1:] if issubclass(base, Objective) and base is not Objective)
    files = {path_of(name), *(Path(inspect.getfile(base)) for base in bases)}
    parts = [part for file in files for part in ast.parse(file.read_text()).body]
    nodes = (node for part in parts if getattr(part, "name", "") != "Config" for node in ast.walk(part))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def _needed_by_config(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of an objective's file that its `Config` needs: imports from light modules, and the definitions of
    all names that it uses directly or indirectly."""
    definitions: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            definitions |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    names_to_visit, used = ["Config"], set[ast.stmt]()
    while names_to_visit:
        definition = definitions.get(names_to_visit.pop())
        if definition is not None and definition not in used:
            used.add(definition)
            names_to_visit += [node.id for node in ast.walk(definition) if isinstance(node, ast.Name)]

    def is_light(node: ast.stmt) -> bool:
        if isinstance(node, ast.Import):
            return all(alias.name in LIGHT_MODULES for alias in node.names)
        return isinstance(node, ast.ImportFrom) and node.module in LIGHT_MODULES

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
