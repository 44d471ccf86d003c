"""Check which run the checkpoints in `checkpoint.folder` belong to. A run may neither resume from nor delete
checkpoints of another run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.jsonl_rows import iterate_rows
from pretrain.run_folder.marker import holds_run, read_marker, update_marker
from pretrain.run_folder.written_files import MARKER

if TYPE_CHECKING:
    from pretrain.checkpoint.store import Store


def check_checkpoint_owner(recipe: Recipe, run: Path) -> None:
    """Raises UserError if `checkpoint.folder` holds checkpoints of another run, or a file that the checkpoints would
    replace. If the run folder was lost, its checkpoints are recognised by the path that they store, and the run takes
    over their id."""
    store = external_store(recipe.checkpoint.folder, run, recipe.checkpoint.retry_seconds)
    if store is None:
        return
    owner = store.owner()
    if owner is None:
        return store.check_latest()
    marker, here = read_marker(run), str(run.resolve())
    same_folder = bool(owner["folder"]) and str(Path(owner["folder"]).resolve()) == here
    if owner["id"]:
        is_own = owner["id"] in (marker.id, marker.deleting_id)
    else:  # checkpoints of a version without ids
        is_own = same_folder or marker.checkpoints_without_id == recipe.checkpoint.folder
    if is_own:
        if not same_folder and _is_copy(run, owner):
            raise UserError(_of_the_original(store, owner, run))
        return
    if same_folder and not has_results(run) and marker.deleting_id is None:
        update_marker(run, id=owner["id"])
        return
    raise UserError(another_run(store, owner))


def _is_copy(run: Path, owner: dict[str, str]) -> bool:
    """Whether the run folder that `owner` names still exists, so that `run` is a copy of it: it was not moved."""
    original = Path(owner["folder"])
    if not owner["id"] or not holds_run(original, owner["id"]):
        return False
    # a folder that is mounted at two places has two paths, but one marker
    return (original / MARKER).stat().st_ino != (run / MARKER).stat().st_ino


def _of_the_original(store: Store, owner: dict[str, str], run: Path) -> str:
    """The error message for a `checkpoint.folder` that holds the checkpoints of the run of which `run` is a copy."""
    complete = store.complete_names()
    resume = f" checkpoint.resume={store.path(complete[-1])}" if complete else ""
    return (
        f"checkpoint.folder = {store.url}: holds the checkpoints of {owner['folder']}, of which {run} is a copy; in the"
        f" copy write checkpoint.folder=ANOTHER{resume}"
    )


def another_run(store: Store, owner: dict[str, str]) -> str:
    """The error message for a `checkpoint.folder` that holds the checkpoints of another run."""
    complete = store.complete_names()
    to_resume = (
        f" (to resume from there: checkpoint.resume={store.path(complete[-1])} checkpoint.folder=ANOTHER)"
        if complete
        else ""
    )
    run_id = f" ({owner['id'][:8]})" if owner["id"] else ""
    return (
        f"checkpoint.folder = {store.url}: holds the checkpoints of another run,"
        f" {owner['folder'] or 'unknown'}{run_id}; choose another folder{to_resume}, or delete those checkpoints"
    )


def external_store(folder: str, run: Path, retry_seconds: float = 60.0) -> Store | None:
    """The store at `checkpoint.folder`; None if that is empty, or if it is RUN/checkpoints."""
    if not folder:
        return None
    from pretrain.checkpoint.disk_store import DiskStore
    from pretrain.checkpoint.open_store import open_checkpoint_store

    store = open_checkpoint_store(folder, retry_seconds)
    inside = isinstance(store, DiskStore) and Path(store.url).resolve() == (run / "checkpoints").resolve()
    return None if inside else store


def has_results(run: Path) -> bool:
    """Whether the run folder holds rows of metrics or results, checkpoints or exports."""
    if any(True for name in ("metrics.jsonl", "results.jsonl") for _ in iterate_rows(run / name)):
        return True
    return any((run / "checkpoints").glob("[0-9]*")) or any((run / "export").glob("[0-9]*"))
