"""Opens the store of checkpoints that a path, a URL or a recipe names."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.storage.urls import is_local
from pretrain.checkpoint.disk_store import DiskStore
from pretrain.checkpoint.remote_store import RemoteStore
from pretrain.checkpoint.store import Store
from pretrain.recipes.recipe import Recipe


def open_checkpoint_store(url: str | Path, retry_seconds: float = 60.0) -> Store:
    """The store at a path or URL. A failed request to a remote store is retried for `retry_seconds`."""
    url = str(url)
    if is_local(url):
        return DiskStore(url.removeprefix("file://").removeprefix("local://"), retry_seconds)
    return RemoteStore(url, retry_seconds)


def run_store(run: Path, recipe: Recipe) -> Store:
    """The store of a run's checkpoints: `checkpoint.folder`, or RUN/checkpoints."""
    return open_checkpoint_store(recipe.checkpoint.folder or run / "checkpoints", recipe.checkpoint.retry_seconds)


def complete_checkpoints(run: Path, folder: str = "") -> list[Path]:
    """The folders of the complete checkpoints in RUN/checkpoints, or in `folder` on a disk, in order of their steps."""
    store = open_checkpoint_store(folder or run / "checkpoints")
    return [Path(store.path(name)) for name in store.complete_names()]
