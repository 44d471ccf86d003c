"""`unlabeled checkpoint inspect|verify|consolidate PATH`: what a checkpoint is, whether it is whole, and its model as one file.

PATH is a checkpoint (RUN/checkpoints/1000, or a URL), or a folder of them, of which the latest is meant. No recipe, objective or process group is
needed, and nothing that is read is executed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain.checkpoint_format import Reader, fill, read_metadata
from pretrain.checkpoint_store import ABOUT, Damaged, Store, name_of, open_folder
from pretrain.errors import UserError


def locate(path: str) -> tuple[Store, str]:
    """(store, name) of a checkpoint given by its path (the zeros before a step may be left out), by the folder of checkpoints, or by its run."""
    folder, _, name = path.rstrip("/").rpartition("/")
    store = open_folder(folder or ("." if not path.startswith("/") else "/"))
    if store.size(name, ABOUT) is not None:
        return store, name
    if store.size(name, "config.json") is not None:
        raise UserError(
            f"{path}: is an export, a backbone alone; name its run, or a checkpoint such as RUN/checkpoints/1000"
        )
    if name.isdigit():
        held = store.names()
        if (full := name_of(int(name))) in held:  # whole or not: what is missing is said where it is read
            return store, full
        raise UserError(
            f"{path}: holds no checkpoint; {store.url} has the steps {', '.join(str(int(n)) for n in held) or 'none'}"
        )
    for url in (path.rstrip("/"), f"{path.rstrip('/')}/checkpoints"):
        store = open_folder(url)
        if newest := store.latest():
            return store, newest
    raise UserError(f"{path}: holds no checkpoint; name a folder such as RUN/checkpoints/1000")


def names_one(path: Path) -> bool:
    """Whether that is a checkpoint, or a run, or a step beside checkpoints, which `locate` then finds or misses."""
    if (path / ABOUT).is_file() or (path / "recipe.yaml").is_file():
        return True
    return path.name.isdigit() and any(path.parent.glob(f"*/{ABOUT}"))


def inspect(path: str) -> list[str]:
    """Lines: step, versions, data, recipe in short, files, and tensors by part."""
    store, name = locate(path)
    about = store.about(name)
    files: dict[str, list] = about["files"]
    recipe = about["recipe"]
    out = [
        f"{store.path(name)}",
        f"step        {about['step']} of {recipe['steps']}, written by {about['processes']} process(es)",
        f"recipe      {recipe['objective']['name']} on {recipe['model']['name']}, batch {recipe['data']['batch']}, {recipe['precision']}",
        f"versions    {', '.join(f'{k} {v}' for k, v in about['versions'].items())}",
        *(f"data        {d['samples']} samples of {d['shards']}, id {d['id']}" for d in about["data"]),
        f"files       {len(files)}, {sum(size for size, _ in files.values()) / 1e6:.1f} MB",
    ]
    parts: dict[str, list[int]] = {}
    for key, value in read_metadata(store, name, files).state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            count = parts.setdefault(key.partition(".")[0], [0, 0])
            count[0] += 1
            count[1] += math.prod(value.size)
    return out + [
        f"{part:<12}{tensors} tensors, {numbers / 1e6:.3f} M numbers" for part, (tensors, numbers) in parts.items()
    ]


def verify(path: str) -> list[str]:
    """What is wrong with a checkpoint, a line each: every byte is read and compared with its digest."""
    store, name = locate(path)
    try:
        files = store.about(name)["files"]
    except Damaged as error:
        return [str(error)]
    out = store.problems(name, files)
    if not out:
        for file in files:
            try:
                with store.checked(name, file, files):
                    pass
            except Damaged as error:
                out.append(str(error))
    if not out:
        try:
            read_metadata(store, name, files)
        except Damaged as error:
            out.append(str(error))
    return out


def consolidate(path: str, target: str) -> str:
    """Write the model's tensors (teacher included) as one safetensors file; where it was written. Optimizer state stays behind."""
    store, name = locate(path)
    about = store.about(name)
    metadata = read_metadata(store, name, about["files"])
    model: dict[str, Any] = {
        key.removeprefix("model."): torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    if not model:
        raise UserError(f"{store.path(name)}: holds no tensors of a model")
    file = Path(target)
    if file.is_dir() or file.suffix != ".safetensors":
        file = file / f"{name}.safetensors"
    reader = Reader(store, name, about["files"], metadata)
    fill({"model": model}, reader, store.path(name), alone=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.partial")
        save_file(model, str(temporary), {"step": str(about["step"]), "format": "pt"})
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None
    return str(file)
