"""`overwrite=true`: deletes what the program has written to a run folder, and the run's checkpoints elsewhere."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from common import output
from common.errors import UserError
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.checkpoint_owner import another_run, check_checkpoint_owner, external_store
from pretrain.run_folder.marker import Marker, read_marker, update_marker
from pretrain.run_folder.written_files import LOCK, MARKER, RUN_FILES, delete_files

if TYPE_CHECKING:
    from pretrain.checkpoint.store import Store

MAX_NAMED_FILES = 5  # in a log line


def delete_run(recipe: Recipe, run: Path) -> Marker:
    """Delete a run's files and checkpoints, but no other files in its folders. Returns the marker of the new run, which
    has a new id.

    The marker keeps the former id until everything is deleted, so that the next command completes a deletion that was
    interrupted. Raises UserError, before anything is deleted, if a checkpoint belongs to another run.
    """
    check_checkpoint_owner(recipe, run)
    marker = read_marker(run)
    store = external_store(recipe.checkpoint.folder, run, recipe.checkpoint.retry_seconds)
    for each in (store, _own_store(run)):
        if each is not None:
            _check_each_owner(each, marker)
    if marker.deleting_id is None:
        ids = {"id": uuid.uuid4().hex, "deleting_id": marker.id}
        marker = update_marker(run, **ids, files=marker.files, resumed_from=None, jobs=None, saved_in=None)
    _delete_checkpoints(run, store, marker)
    # A marker may have been edited: ignore patterns of files that the program never writes.
    patterns = [pattern for pattern in marker.files if pattern in RUN_FILES]
    kept = delete_files(run, tuple(pattern for pattern in patterns if pattern not in (MARKER, LOCK, f"{LOCK}.*")))
    if kept:
        named = ", ".join(kept[:MAX_NAMED_FILES])
        named += f" and {len(kept) - MAX_NAMED_FILES} more" if len(kept) > MAX_NAMED_FILES else ""
        output.say(f"{run}: overwritten; these files are not the run's and were kept: {named}")
    return update_marker(run, deleting_id=None, checkpoints_without_id=None)


def _own_store(run: Path) -> Store | None:
    """The store at RUN/checkpoints; None if it does not exist."""
    from pretrain.checkpoint.disk_store import DiskStore

    return DiskStore(str(run / "checkpoints")) if (run / "checkpoints").is_dir() else None


def _check_each_owner(store: Store, marker: Marker) -> None:
    """Raises UserError if one of the checkpoints belongs to another run."""
    for name in store.complete_names():
        if store.is_of_another_run(name, (marker.id, marker.deleting_id)):
            raise UserError(another_run(store, store.run_json(name)["run"]))


def _delete_checkpoints(run: Path, store: Store | None, marker: Marker) -> None:
    if store is not None and store.owner() is not None:  # without an owner, nothing in that folder is a run's
        store.delete_all(new_owner={"id": marker.id, "folder": str(run.resolve())})
    if (own := _own_store(run)) is not None:
        own.delete_all(new_owner=None)
