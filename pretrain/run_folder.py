"""The folder of a run: recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/, export/, results.jsonl, pictures/, log.txt, report.html.

`prepare` decides what a command means for a folder that exists: the same recipe goes on, another one is refused. Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pretrain import auto, config
from pretrain.errors import UserError
from pretrain.recipe import Recipe, load

# keys that change no number of the training: they may differ when a run goes on
FREE = (
    "parallel.mode",
    "parallel.replicate",
    "parallel.frozen",
    "parallel.recompute",
    "parallel.compile",
    "parallel.offload",
    "parallel.timeout",
    "skip.most",
    "run",
    "overwrite",
    "threads",
    "log.",
    "checkpoint.",
    "export.",
    "eval.",
    "data.workers",
    "data.threads",
    "data.fetch.",
    "data.bad_",
)


def prepare(recipe: Recipe) -> Path:
    """The run folder, made or found fit to go on in, with the resolved recipe written to it.

    A `precision: auto` takes what the folder's recipe has resolved it to. Raises UserError where the folder holds another run or no run.
    """
    check_data(recipe)
    run = Path(recipe.run)
    stored = run / "recipe.yaml"
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another folder with run=FOLDER")
    filled = run.is_dir() and any(run.iterdir())
    if filled and not stored.is_file():
        raise UserError(f"{run}: holds files but no run; choose another folder with run=FOLDER")
    if filled and recipe.overwrite:
        shutil.rmtree(run)
        filled = False
    if filled:
        old = load(stored)
        if recipe.precision == "auto":
            recipe.precision = vars(old)["precision"]
        auto.keep(old, recipe)
        begun = read_rows(run / "metrics.jsonl") or any((run / "checkpoints").glob("[0-9]*"))
        changed = _changed(old, recipe, run)
        if (
            changed and not begun
        ):  # it failed before its first step: nothing is lost, and the recipe has been mended since
            shutil.rmtree(run)
        elif changed:
            raise UserError(
                f"{run}: holds a run of another recipe ({'; '.join(changed[:4])}{' …' if len(changed) > 4 else ''});"
                " choose another folder with run=FOLDER, or delete that run with overwrite=true"
            )
    recipe.overwrite = False
    run.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, run)
    return run


def check_data(recipe: Recipe) -> None:
    """Refuse a recipe that names no training data, or names it twice."""
    if not recipe.data.train and not recipe.data.mix:
        raise UserError(
            "data.train is empty; write data.train=SHARDS, a folder made by `unlabeled shards build IMAGES SHARDS`"
        )
    if recipe.data.train and recipe.data.mix:
        raise UserError(
            "data.train and data.mix are both given; put the shards of data.train into data.mix as one more dataset"
        )


def _changed(old: Recipe, new: Recipe, run: Path) -> list[str]:
    """What differs between two recipes and would change numbers that the run has; phases that lie ahead of it may be added or changed."""
    before, after = config.to_dict(old), config.to_dict(new)
    reached = max((int(p.name) for p in (run / "checkpoints").glob("[0-9]*")), default=0)
    for recipe in (before, after):
        recipe["data"]["phases"] = [phase for phase in recipe["data"]["phases"] if phase["step"] < reached]
    before_mix, mix = before["data"]["mix"], after["data"]["mix"]
    if before_mix and all(not source["weight"] and source["weight"] is not None for source in mix[len(before_mix) :]):
        after["data"]["mix"] = mix[: len(before_mix)]  # datasets for a phase to come
    if not after["parallel"]["accumulate_coupled"]:  # else the loss is that of micro-batches: it depends on their size
        before["parallel"] = after["parallel"]
    return [d for d in config.differences(before, after) if not d.startswith(FREE)]


def write_recipe(recipe: Recipe, run: Path) -> None:
    """Store the resolved recipe, atomically."""
    temporary = run / ".recipe.yaml"
    temporary.write_text(f"# resolved; `unlabeled train {run}` goes on with it\n{config.dump(recipe)}")
    temporary.replace(run / "recipe.yaml")


def exports(run: Path, student: str = "") -> dict[int, Path]:
    """{step: folder} of all exports, in order: of the recipe's model, or of a student beside it."""
    folders = (run / "export" / student).glob("*")
    found = {int(p.name): p for p in folders if p.name.isdigit() and (p / "config.json").is_file()}
    return dict(sorted(found.items()))


def students(run: Path) -> dict[str, dict[int, Path]]:
    """{name: {step: folder}} of what a distillation exports beside the recipe's model."""
    names = sorted(
        p.name for p in (run / "export").glob("*") if p.is_dir() and p.name[0] != "." and not p.name.isdigit()
    )
    return {name: found for name in names if (found := exports(run, name))}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, none where there is no file; a line that is no row (a killed process leaves half of one) is passed over."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) and "step" in row else []
    return rows
