"""A recipe: one YAML file that names everything that a run needs. `load("demo", ["steps=100"])` reads a recipe and
checks it, without importing torch.

A recipe may extend another one (`extends: NAME or FILE`). Overrides with dotted keys come last. The resolved recipe,
with every default written out, is stored in the run folder, and reproduces the run exactly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import build_config, config, yaml_values
from common.config import Section, option
from common.errors import ConfigError, nearest
from common.schedules import Schedule
from common.yaml_values import Origin
from pretrain.models import families, presets
from pretrain.objectives import finder
from pretrain.objectives.options import Options
from pretrain.recipes import size_dial
from pretrain.recipes.evaluation import Eval
from pretrain.recipes.sections import Checkpoint, Data, Derived, Export, Init, Log, Optim, Parallel, Skip

FOLDER = Path(__file__).parent
MAX_NAME_BYTES = 255  # of a file
MAX_PATH_BYTES = 3800  # of a run folder: Linux allows 4096, of which the paths of files in the folder need the rest
CHOSEN = {"model", "objective"}  # sections whose options depend on their name
FORMER_NAMES = {("eval", "periodic"): "quick"}  # {(section, key of an earlier version): its name now}


@dataclass
class Recipe(Section):
    # number of steps of the optimizer in the whole run; auto, for decoders only: see pretrain/recipes/size_dial.py
    steps: Derived
    # the backbone: a name of pretrain/models/presets.py, and its options
    model: families.Model = field(metadata={"choose": presets.choose})
    # the method: a name that `unlabeled recipes` lists, or a .py file of your own, and its options
    objective: Options = field(metadata={"choose": finder.config_class})
    run: str = ""  # the run folder; empty: runs/<name of the recipe>
    # seed of the initial weights, of the order of the samples and of all other random numbers; runs with the same seed
    # have the same result
    seed: int = 0
    device: str = "auto"  # a device of torch, such as cuda or cpu; auto: cuda if there is one, otherwise cpu
    # number format of the computation; weights are fp32 in any case. auto: the fastest one here, measured on the first
    # batch
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # number of threads that compute the model on a CPU; null: chosen from the number of cores
    threads: int | None = option(None, low=1)
    overwrite: bool = False  # delete the files that the run has written, and start again; other files are kept
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    init: Init = field(default_factory=Init)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    skip: Skip = field(default_factory=Skip)
    export: Export = field(default_factory=Export)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    derived = list[str]()  # not a field: lines that list the values which the size dial has derived

    def check(self) -> None:
        if self.steps != "auto" and self.steps < 1:  # type: ignore[comparison-overlap]
            raise ValueError(f"steps = {self.steps}: must be 1 or more")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"seed = {self.seed}: must fit into 64 bits")
        micro = self.parallel.micro_batch
        if micro is not None and isinstance(micro, int) == (self.data.budget is not None):
            wanted = "parallel.micro_batch={seconds: S}" if isinstance(micro, int) else "a number of samples"
            raise ValueError(
                f"parallel.micro_batch is {'a number of samples' if isinstance(micro, int) else 'a budget of seconds'},"
                f" but data.batch is not; write {wanted}, or null"
            )
        if self.init.backbone and self.init.run:
            raise ValueError(
                "init.backbone and init.run are both given; remove one: init.run also holds the weights of the backbone"
            )
        if vars(self.init)["text"] and "text" not in vars(self.objective):
            raise ValueError(
                f"init.text = {vars(self.init)['text']}: objective {self.objective.name} has no text model beside `model`;"
                " write init.backbone for the weights of `model`"
            )
        if vars(self.init)["text"] and self.init.run:
            raise ValueError(
                "init.text and init.run are both given; remove one: init.run also holds the weights of the text model"
            )
        for tier in ("quick", "full"):
            every = getattr(self.eval, tier).every
            if every and every % self.export.every:
                multiple = -(-every // self.export.every) * self.export.every
                raise ValueError(
                    f"eval.{tier}.every = {every}: exports are written every {self.export.every} steps (export.every);"
                    f" write a multiple of it, such as eval.{tier}.every={multiple}"
                )


@dataclass
class StoredRecipe(Recipe):
    """A recipe that is read without executing the file of a user's objective, whose options are left out."""

    objective: Options = field(metadata={"choose": finder.config_without_execution})


def names() -> dict[str, str]:
    """{name: purpose} of the recipes that come with the project; the purpose is the first comment line of the file."""
    return {path.stem: path.read_text().partition("\n")[0].lstrip("# ") for path in sorted(FOLDER.glob("*.yaml"))}


# ---------------------------------------------------------------- reading
def load(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe with a name or a path, changed by overrides such as "optim.lr.value=1e-3", checked and resolved.

    Raises ConfigError.
    """
    name = yaml_values.expand_home(str(name))
    path = find(name)
    values: dict[str, Any] = {}
    origin: Origin = {}
    _read(path, values, origin)
    file_steps = values.get("steps")
    for text in overrides or []:
        key, value = yaml_values.parse_override(text)
        layer = _with_new_names(expand_paths(yaml_values.nest(key, value), ""), "command line: ")
        yaml_values.merge(values, origin, layer, "command line", CHOSEN)
    if path == Path(name) / "recipe.yaml" and not any(text.startswith("run=") for text in overrides or []):
        values["run"] = str(name)  # the stored path is wrong if the run folder was moved or copied
    if path.name == "recipe.yaml" and values.get("steps") != file_steps:
        _drop_schedule_lengths(values, file_steps, origin)
    recipe = build_config.build(Recipe, values, origin or {"": str(path)})
    recipe.run = _run_folder(vars(recipe)["run"] or f"runs/{path.stem}")
    return resolve(recipe)


def stored(run: Path, trusted: str = "", file: str = "recipe.yaml") -> Recipe:
    """The recipe in a run folder, for commands that score, report or compare the run.

    `trusted`: the path of an objective's file that the user has named, so that it may be executed. No other file that
    the recipe names is executed.
    """
    path = run / file
    if not path.is_file():
        raise ConfigError(
            f"{run}: is no run folder (recipe.yaml is missing); name a folder that `unlabeled train` wrote, such as"
            " runs/demo"
        )
    values: dict[str, Any] = {}
    origin: Origin = {}
    _read(path, values, origin)
    name = (values.get("objective") or {}).get("name")
    if isinstance(name, str) and finder.is_file(name) and name != trusted:
        values["objective"] = {"name": name}
    recipe = build_config.build(Recipe if name == trusted else StoredRecipe, values, origin or {"": str(path)})
    recipe.run = vars(recipe)["run"] or str(run)
    return resolve(recipe)


def find(name: str, folder: Path | None = None, where: str = "") -> Path:
    """The file of a recipe that is given by its name or by a path, which may also be relative to `folder`.

    Raises ConfigError that begins with `where`.
    """
    for candidate in (Path(name), *([folder / name] if folder else []), FOLDER / f"{name}.yaml"):
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in candidate.parts) or "\0" in name:
            raise ConfigError(f"{where}{name[:80]!r}…: a name of more than {MAX_NAME_BYTES} bytes; no file has one")
        if len(os.fsencode(candidate)) > MAX_PATH_BYTES:
            raise ConfigError(f"{where}{name[:80]!r}…: a path of more than {MAX_PATH_BYTES} bytes; no file has one")
        if candidate.is_file():
            return candidate
        if candidate.is_dir() and (candidate / "recipe.yaml").is_file():  # a run folder stands for its recipe
            return candidate / "recipe.yaml"
    if name.endswith((".yaml", ".yml")):
        raise ConfigError(f"{where}{name}: no such file")
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{where}{name}: is no run folder: it holds no recipe.yaml")
    if "/" in name:
        runs = [str(path.parent / run.parent.name) for run in path.parent.glob("*/recipe.yaml")]
        raise ConfigError(f"{where}{name}: no such run folder or file{'; ' + nearest(name, runs) if runs else ''}")
    raise ConfigError(
        f"{where}{name}: no such recipe; {nearest(name, names())} (`unlabeled recipes` lists them; a path must end in"
        " .yaml)"
    )


def _read(path: Path, values: dict, origin: Origin, extending: tuple[Path, ...] = ()) -> None:
    """Merge a recipe file into `values`, after the recipe that it extends. `extending`: the chain of recipes that
    extend this one."""
    path = path.resolve()
    if path in extending:
        raise ConfigError(f"{path}: extends itself by way of {' → '.join(p.name for p in extending)}")
    content = yaml_values.read_yaml(path)
    base = content.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: extends = {base!r}: expected the name or the file of a recipe")
        base = yaml_values.expand_home(base, f"{path}: extends = ")
        _read(find(base, path.parent, f"{path}: extends "), values, origin, (*extending, path))
    layer = _with_new_names(expand_paths(content, f"{path}: "), f"{path}: ")
    yaml_values.merge(values, origin, layer, str(path), CHOSEN)


def _with_new_names(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Plain values in which keys of earlier versions have their new names. Raises ConfigError if both are given."""
    for (section, former), name in FORMER_NAMES.items():
        given = values.get(section)
        if isinstance(given, dict) and former in given:
            if name in given:
                raise ConfigError(f"{where}{section}.{former} is the former name of {section}.{name}; remove it")
            values = values | {section: {name if key == former else key: value for key, value in given.items()}}
    return values


def _drop_schedule_lengths(values: dict[str, Any], file_steps: Any, origin: Origin, prefix: str = "") -> None:
    """Remove the length (`steps`) of each schedule that is as long as the run in the file, `file_steps`.

    A stored recipe holds the length of every schedule. Without it, a schedule gets the new length of the run. A length
    that the command line has set is kept.
    """
    for key, value in values.items():
        if isinstance(value, dict):
            is_run_length = "kind" in value and value.get("steps") == file_steps
            if is_run_length and origin.get(f"{prefix}{key}.steps") != "command line":
                del value["steps"]
            _drop_schedule_lengths(value, file_steps, origin, f"{prefix}{key}.")


def resolve(recipe: Recipe) -> Recipe:
    """Derive the values of the size dial, and give the length of the run to every schedule that has no length."""
    recipe.derived = [*recipe.derived, *size_dial.derive(recipe)]
    for section in config.sections(recipe):
        if isinstance(section, Schedule):
            if vars(section)["steps"] is None:
                section.steps = vars(recipe)["steps"]
            # Make the length a default, so that it is no error if nothing reads it: the user has not written it.
            section._defaults = {**vars(section).get("_defaults", {}), "steps": section.steps}
    return recipe


# ---------------------------------------------------------------- paths
def expand_paths(value: Any, where: str, key: str = "") -> Any:
    """Plain values in which "~/" at the beginning of a text is replaced by the home folder. Prompts are not changed.

    Raises ConfigError for a text that is longer than a path can be, because the operating system would refuse it.
    """
    if key == "eval.prompts":
        return value
    if isinstance(value, dict):
        return {k: expand_paths(v, where, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [expand_paths(v, where, key) for v in value]
    if not isinstance(value, str):
        return value
    text = yaml_values.expand_home(value, f"{where}{key} = ")
    _check_length(text, f"{where}{key} = ")
    return text


def _check_length(text: str, where: str) -> None:
    """Raises ConfigError for a text that is too long for a path. Not checked are URLs, and parts of a path with braces
    or wildcards, which may stand for shorter names."""
    parts = [part for part in text.split("/") if "://" not in text and not any(mark in part for mark in "{*?[")]
    longest, total = max((len(os.fsencode(part)) for part in parts), default=0), len(os.fsencode(text))
    if longest > MAX_NAME_BYTES or (parts and total > MAX_PATH_BYTES):
        raise _too_long(f"{where}{text[:80]!r}", total, longest)


def _run_folder(run: str) -> str:
    """The path of the run folder, with "~" expanded. Raises ConfigError for a URL or a path that cannot exist."""
    if "://" in run:
        raise ConfigError(
            f"run = {run}: a run folder lies on a disk; write run=FOLDER, and checkpoint.folder={run} for its"
            " checkpoints"
        )
    out = yaml_values.expand_home(run, "run = ")
    longest, total = max((len(os.fsencode(part)) for part in out.split("/")), default=0), len(os.fsencode(out))
    if "\0" in out or longest > MAX_NAME_BYTES or total > MAX_PATH_BYTES:
        raise _too_long(f"run = {run[:80]!r}", total, longest)
    return out


def _too_long(start: str, total: int, longest: int) -> ConfigError:
    return ConfigError(f"{start}…: is {total} bytes long, with a part of {longest}; no folder has such a name")
