"""Prepare the run folder that a recipe names: create it, or resume the run of the same recipe; refuse anything else.
This package does not import torch.

A run folder holds recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/, export/, results.jsonl, pictures/, log.txt,
report.html, and its marker .run.json.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import config, output, yaml_values
from common.errors import UserError
from pretrain.recipes import defaults
from pretrain.recipes.recipe import Recipe
from pretrain.recipes.recipe import stored as stored_recipe
from pretrain.run_folder.checkpoint_owner import external_store, has_results
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.marker import is_restart, read_marker, remember_job
from pretrain.run_folder.overwrite import delete_run
from pretrain.run_folder.recipe_changes import changes_of_trained_steps, refusal
from pretrain.run_folder.recipe_file import (
    HEADER,
    replace_recipe,
    restore_recipe,
    stored_checkpoint_folder,
    trained_recipe,
    write_recipe,
)
from pretrain.run_folder.run_lock import Lock
from pretrain.run_folder.written_files import FORMER_RECIPE, LOCK, MARKER, RECIPE

if TYPE_CHECKING:
    from pretrain.checkpoint.store import Store


def prepare(recipe: Recipe, lock: Lock | None = None) -> Path:
    """Create the run folder, or check that this recipe can resume the run in it; lock it with `lock`, and write the
    resolved recipe to it. Returns the folder.

    Values of the recipe that are still "auto", such as `precision`, are replaced by those of the run. Raises UserError
    if the folder is in use, or holds a run of another recipe, or files but no run.
    """
    check_data(recipe)
    run = Path(recipe.run)
    _make_folder(run)
    if lock is not None:
        lock.take(run)
    marker = read_marker(run)
    overwrite = recipe.overwrite
    if overwrite and is_restart(marker):
        output.say(
            f"{run}: a job of this id has trained it before and may have been restarted, so overwrite=true is not done"
            " again, and the run is resumed; to overwrite it, start a job with another id (torchrun --rdzv-id)"
        )
        overwrite = False
    if overwrite or marker.deleting_id is not None:
        marker = delete_run(recipe, run)
    recipe.overwrite = False
    trained = trained_recipe(run)
    store = _store_of_begun_run(run, trained) if trained.is_file() else None
    if store is not None:
        _check_changes(recipe, run, trained, store)
    remember_job(run, marker)
    if store is not None and trained.name != FORMER_RECIPE:
        replace_recipe(recipe, run)
    else:
        write_recipe(recipe, run)
    return run


@contextlib.contextmanager
def run_folder_lock() -> Iterator[Lock]:
    """Context with a lock for `prepare`. At its end the lock is released. If the command has not trained a step, the
    former recipe is restored."""
    lock = Lock()
    try:
        yield lock
    finally:
        if lock.run is not None:
            restore_recipe(lock.run)
        lock.release()


def check_data(recipe: Recipe) -> None:
    """Raises UserError for a recipe without training data, with both `data.train` and `data.mix`, or with a secret,
    which would be stored in recipe.yaml."""
    for key, value in yaml_values.leaves(config.to_dict(recipe)):
        if not key.startswith("eval.prompts") and (reason := output.secrets_error(str(value))):
            raise UserError(f"{key} = {value}: {reason}")
    if not recipe.data.train and not recipe.data.mix:
        raise UserError(
            "data.train is empty; write data.train=FOLDER, a folder of images,"
            " or one of shards as `unlabeled shards build` writes them"
        )
    if recipe.data.train and recipe.data.mix:
        raise UserError(
            "data.train and data.mix are both given; put the shards of data.train into data.mix as one more dataset"
        )


def _make_folder(run: Path) -> None:
    """Create the folder. Raises UserError if it cannot be created, or exists and is neither a run folder nor empty."""
    try:
        _check_folder(run)
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{run}: cannot be made or read ({error.strerror or error}); choose a folder with write permission with"
            " run=FOLDER"
        ) from None


def _check_folder(run: Path) -> None:
    """Raises UserError if the path exists and is neither a run folder nor an empty folder."""
    if run.is_symlink() and not run.exists():
        raise UserError(
            f"{run}: is a link to {os.readlink(run)}, which does not exist; make that folder,"
            " or choose another with run=FOLDER"
        )
    if run.exists() and not run.is_dir():
        raise UserError(f"{run}: is a file; choose another folder with run=FOLDER")
    if run.is_dir() and any(run.iterdir()) and not _is_run(run):
        raise UserError(f"{run}: holds files but no run; choose another folder with run=FOLDER")


def _is_run(run: Path) -> bool:
    """Whether this program has made the folder: it has a marker, or is the run of an earlier version without
    markers."""
    if (run / MARKER).is_file():
        return True
    names = {path.name for path in run.iterdir()}
    if all(name.startswith(LOCK) or name == ".recipe.yaml" for name in names):
        return True  # another process is just starting a run here, or was killed while it started one
    if not _first_line(run / RECIPE).startswith(HEADER):
        return False
    # beside a recipe that was copied from a run, a user may have a log.txt and other files with names that runs use
    logged = re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", _first_line(run / "log.txt"))
    return names <= {RECIPE, ".recipe.yaml"} or logged is not None or bool(read_rows(run / "metrics.jsonl"))


def _first_line(path: Path) -> str:
    """The first line of a text file; "" if it cannot be read."""
    try:
        with path.open(errors="replace") as file:
            return file.readline(1000)
    except OSError:
        return ""


def _store_of_begun_run(run: Path, recipe_yaml: Path) -> Store | None:
    """The checkpoint store of a run that has results or a checkpoint; None for a run that failed before its first step,
    whose recipe may therefore still change."""
    from pretrain.checkpoint.disk_store import DiskStore

    store = external_store(stored_checkpoint_folder(recipe_yaml), run) or DiskStore(str(run / "checkpoints"))
    return store if has_results(run) or store.complete_names() else None


def _check_changes(recipe: Recipe, run: Path, recipe_yaml: Path, store: Store) -> None:
    """Replace "auto" values of a recipe by those of the run's stored recipe. Raises UserError if the recipes differ in
    an option on which the trained steps depend."""
    # The objective's file is executed only if the new recipe names the same file.
    old = stored_recipe(run, recipe.objective.name, recipe_yaml.name)
    stored = yaml_values.read_yaml(recipe_yaml)
    data = stored.get("data") or {}
    if "mean" in data and "pixel_dtype" not in data:  # a run on images of an earlier version
        old.data.pixel_dtype = "uint8"
    if recipe.precision == "auto":
        recipe.precision = vars(old)["precision"]
    defaults.keep(old, recipe)
    if "open" not in (stored.get("optim") or {}).get("lr", {}):  # an earlier version
        recipe.optim.lr.open = False
    if changes := changes_of_trained_steps(old, recipe, store):
        raise UserError(refusal(run, changes, store))
