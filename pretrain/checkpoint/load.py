"""Finds the checkpoint that a run resumes from, and loads it. All bytes are compared with their digests before they are
used, and nothing in a checkpoint is executed (no pickle)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from common.untrusted import is_number
from data_pipeline.stream.stream import Stream
from pretrain.checkpoint.dcp_format import Reader, differences, fill, read_metadata
from pretrain.checkpoint.disk_store import DiskStore
from pretrain.checkpoint.integrity import Files
from pretrain.checkpoint.open_store import open_checkpoint_store, run_store
from pretrain.checkpoint.store import RUN_JSON, Store, checkpoint_name
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.marker import read_marker

MAX_NAMED_DIFFERENCES = 3  # in an error message


# ---------------------------------------------------------------- which checkpoint
def checkpoint_to_resume(run: Path, recipe: Recipe, say: Callable[[str], None]) -> tuple[Store, str] | None:
    """(store, name) of the checkpoint that a run resumes from; None if it starts with its first step. Collective: every
    rank must call it.

    `checkpoint.resume` of the recipe names the checkpoint where the run began. When the run has saved checkpoints of
    its own, the same command resumes from the newest of them, and the value in the recipe becomes "latest".
    """
    store, wanted = run_store(run, recipe), recipe.checkpoint.resume

    def find() -> tuple[str, str, str | int] | None:
        marker = read_marker(run)
        has_begun_there = str(wanted) == marker.resumed_from or (
            _is_of_another_store(store, wanted) and store.latest() is not None
        )
        chosen = "latest" if has_begun_there else wanted
        found = find_checkpoint(store, chosen)
        if found is None and chosen == "latest" and marker.saved_in is not None:
            raise UserError(_lost(run, store, marker.saved_in))
        if chosen != wanted and found is not None:
            by_path = store.path(checkpoint_name(int(wanted))) if is_number(str(wanted)) else ""
            again = f"write checkpoint.resume={by_path}" if by_path else "use a new folder, run=NEW"
            say(
                f"checkpoint.resume = {wanted}: the run has begun there and has newer checkpoints, so it resumes from"
                f" them; to begin there again, {again}"
            )
        return None if found is None else (found[0].url, found[1], chosen)

    found = processes.on_rank_0(find)
    if found is None:
        return None
    url, name, recipe.checkpoint.resume = found
    return open_checkpoint_store(url, store.retry_seconds), name


def _lost(run: Path, store: Store, saved_in: str) -> str:
    """The error message for a run that has saved checkpoints in the folder `saved_in`, while `store` holds none."""
    anew = "to train from the first step again, write checkpoint.resume=none"
    if saved_in == store.location():
        return f"{run}: has saved checkpoints in {saved_in}, which holds none now; mount or restore that folder; {anew}"
    return (
        f"checkpoint.folder = {store.url}: holds no checkpoint of {run}, which has saved its own in {saved_in}; to"
        f" continue from there, write checkpoint.folder={saved_in}, or checkpoint.resume={saved_in}/STEP to save the"
        f" further ones in {store.url}; {anew}"
    )


def _is_of_another_store(store: Store, wanted: int | str) -> bool:
    """Whether `checkpoint.resume` is the path of a checkpoint outside of the run's own store."""
    folder = str(wanted).rstrip("/").rpartition("/")[0]
    if not folder:
        return not (wanted in ("latest", "none") or is_number(str(wanted)))
    other = open_checkpoint_store(folder, store.retry_seconds)
    if isinstance(store, DiskStore) and isinstance(other, DiskStore):
        return Path(other.url).resolve() != Path(store.url).resolve()
    return other.url != store.url


def find_checkpoint(store: Store, wanted: int | str) -> tuple[Store, str] | None:
    """(store, name) of the checkpoint that a value of `checkpoint.resume` names: "latest", a step in this store, or a
    path or URL. None for "none", and for "latest" if the store is empty. Raises UserError if there is no such
    checkpoint."""
    if wanted == "none":
        return None
    if wanted == "latest":
        name = store.latest()
        return None if name is None else (store, name)
    folder, _, name = str(wanted).rstrip("/").rpartition("/")
    if not folder and not is_number(name):
        folder = "."
    store = open_checkpoint_store(folder, store.retry_seconds) if folder else store
    name = checkpoint_name(int(name)) if is_number(name) else name
    if store.size(name, RUN_JSON) is None:
        steps = ", ".join(str(int(n)) for n in store.complete_names()) or "none"
        raise UserError(
            f"checkpoint.resume = {wanted}: no complete checkpoint there; the complete ones in {store.url} are: {steps}"
        )
    return store, name


def is_latest(store: Store, name: str) -> bool:
    """Whether the store's file `latest` names this checkpoint; False if that file is damaged."""
    try:
        return name == store.latest()
    except UserError:
        return False


# ---------------------------------------------------------------- loading
def load(store: Store, name: str, engine: Engine, stream: Stream, **parts: Any) -> int:
    """Load engine, stream, and further parts (with state_dict and load_state_dict) from a checkpoint. Returns the step
    to train next.

    Raises UserError if the checkpoint is of another model, and Damaged, which names the file, if a file has changed
    since it was written.
    """
    run_json = store.run_json(name)
    metadata = read_metadata(store, name, run_json["files"])
    state = {**engine.state_dict(), **{key: part.state_dict() for key, part in parts.items()}}
    if found := differences(state, metadata):
        named = "; ".join(found[:MAX_NAMED_DIFFERENCES])
        named += f" and {len(found) - MAX_NAMED_DIFFERENCES} more" if len(found) > MAX_NAMED_DIFFERENCES else ""
        raise UserError(
            f"{store.path(name)}: is a checkpoint of another model: {named}; use the recipe that it was trained with,"
            " or another run folder"
        )
    stream.load_state_dict(run_json["stream"])  # raises an error for other data before anything is changed
    _fill(store, name, run_json["files"], metadata, state)
    engine.load_state_dict(state)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return run_json["step"]


def load_model(store: Store, name: str, module: torch.nn.Module) -> None:
    """Load only an objective's weights from a checkpoint."""
    files = store.run_json(name)["files"]
    state = {"model": module.state_dict()}
    _fill(store, name, files, read_metadata(store, name, files), state)
    module.load_state_dict(state["model"])


def _fill(store: Store, name: str, files: Files, metadata: Any, state: dict[str, Any]) -> None:
    """Fill `state`, in place, from the checkpoint's files."""
    fill(state, Reader(store, name, files, metadata), store.path(name), alone=not dist.is_initialized())
