"""`unlabeled checkpoint inspect|verify|consolidate PATH`: describe a checkpoint, check that it is complete and
undamaged, or write its model as one file.

PATH is a checkpoint (RUN/checkpoints/1000, or a URL), or a folder of checkpoints, which stands for the latest of them.
No recipe, objective or process group is needed, and nothing in the checkpoint is executed.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.errors import UserError
from common.untrusted import is_number
from data_pipeline.storage.urls import is_local
from pretrain.checkpoint.dcp_format import Reader, fill, read_metadata
from pretrain.checkpoint.integrity import CHUNK_BYTES, Damaged
from pretrain.checkpoint.open_store import open_checkpoint_store
from pretrain.checkpoint.store import RUN_JSON, Store, checkpoint_name
from pretrain.recipes.sections import batch_text
from pretrain.run_folder.recipe_file import stored_checkpoint_folder
from pretrain.run_folder.written_files import RECIPE


def locate(path: str) -> tuple[Store, str]:
    """(store, name) of a checkpoint. `path` names the checkpoint (leading zeros may be omitted), a folder of
    checkpoints, or a run folder, whose recipe may name another `checkpoint.folder`; folders stand for their latest
    checkpoint. Raises UserError if there is none."""
    folder, _, name = path.rstrip("/").rpartition("/")
    store = open_checkpoint_store(folder or ("." if not path.startswith("/") else "/"))
    if store.size(name, RUN_JSON) is not None:
        return store, name
    if store.size(name, "config.json") is not None:
        raise UserError(
            f"{path}: is an export, which holds a backbone alone; name its run, or a checkpoint such as"
            " RUN/checkpoints/1000"
        )
    if is_number(name):
        names = store.names()
        if (full_name := checkpoint_name(int(name))) in names:
            return store, full_name  # even if it is incomplete: reading it then says what is missing
        steps = ", ".join(str(int(n)) for n in names) or "none"
        raise UserError(f"{path}: is not a checkpoint; the steps in {store.url} are: {steps}")
    recipe = Path(path, RECIPE)
    elsewhere = stored_checkpoint_folder(recipe) if is_local(path) and recipe.is_file() else ""
    for url in filter(None, (elsewhere, path.rstrip("/"), f"{path.rstrip('/')}/checkpoints")):
        store = open_checkpoint_store(url)
        if latest := store.latest():
            return store, latest
    raise UserError(f"{path}: holds no checkpoint; name a folder such as RUN/checkpoints/1000")


def names_checkpoint(path: Path) -> bool:
    """Whether a path has the form of a checkpoint's: a checkpoint, a run folder, or a step in a folder of checkpoints.
    `locate` may still find that this step is missing."""
    if (path / RUN_JSON).is_file() or (path / "recipe.yaml").is_file():
        return True
    return is_number(path.name) and any(path.parent.glob(f"*/{RUN_JSON}"))


def inspect(path: str) -> list[str]:
    """Lines that describe a checkpoint: step, main options, versions, data, files, and the tensors of each part."""
    store, name = locate(path)
    run_json = store.run_json(name)
    files: dict[str, list] = run_json["files"]
    recipe = run_json["recipe"]
    lines = [
        f"{store.path(name)}",
        f"step        {run_json['step']} of {recipe['steps']}, written by {run_json['processes']} process(es)",
        f"recipe      {recipe['objective']['name']} on {recipe['model']['name']}, batch {batch_text(recipe['data']['batch'])},"
        f" {recipe['precision']}",
        f"versions    {', '.join(f'{k} {v}' for k, v in run_json['versions'].items())}",
        *(f"data        {d['samples']} samples of {d['shards']}, id {d['id']}" for d in run_json["data"]),
        f"files       {len(files)}, {sum(size for size, *_ in files.values()) / 1e6:.1f} MB",
    ]
    parts: dict[str, list[int]] = {}  # {part of the state: [number of tensors, number of elements]}
    for key, value in read_metadata(store, name, files).state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            counts = parts.setdefault(key.partition(".")[0], [0, 0])
            counts[0] += 1
            counts[1] += math.prod(value.size)
    return lines + [
        f"{part:<12}{tensors} tensors, {numbers / 1e6:.3f} M numbers" for part, (tensors, numbers) in parts.items()
    ]


def verify(path: str) -> list[str]:
    """Read all bytes of a checkpoint and compare them with their digests. Returns a line for each problem."""
    store, name = locate(path)
    try:
        files = store.run_json(name)["files"]
    except Damaged as error:
        return [str(error)]
    if problems := store.wrong_sizes(name, files):
        return problems
    for file in files:
        try:
            with store.read_verified(name, file, files) as stream:
                while stream.read(CHUNK_BYTES):
                    pass
        except Damaged as error:
            problems.append(str(error))
    if not problems:
        try:
            read_metadata(store, name, files)
        except Damaged as error:
            problems.append(str(error))
    return problems


def consolidate(path: str, target: str) -> str:
    """Write the tensors of the model, including those of a teacher but not the optimizer state, as one safetensors
    file. Returns its path. The file may not exist yet."""
    store, name = locate(path)
    file = Path(target)
    if file.is_dir() or file.suffix != ".safetensors":
        file = file / f"{name}.safetensors"
    if os.path.lexists(file):
        raise UserError(f"{file}: exists already; name another file, or delete it")
    run_json = store.run_json(name)
    metadata = read_metadata(store, name, run_json["files"])
    model: dict[str, Any] = {
        key.removeprefix("model."): torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    if not model:
        raise UserError(f"{store.path(name)}: holds no tensors of a model")
    reader = Reader(store, name, run_json["files"], metadata)
    fill({"model": model}, reader, store.path(name), alone=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.partial")
        save_file(model, str(temporary), {"step": str(run_json["step"]), "format": "pt"})
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}); choose another file") from None
    return str(file)
