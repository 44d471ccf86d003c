"""DCP's files, read without executing any pickle in them, and written and read through a `Store` that hashes every byte.

DCP itself unpickles `.metadata` and every value that is no tensor (`torch.load(weights_only=False)`), so whoever can write to a checkpoint could run
code in whatever loads it. Here `.metadata` may name the few classes below and nothing else, and values are loaded with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from pretrain.checkpoint_store import Damaged, Files, Hashed, Store, damaged
from pretrain.errors import UserError

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no process group
METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint."
_HARMLESS = {
    (_DCP + "metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )
} | {(_DCP + "filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}


class _Unpickler(pickle.Unpickler):
    """Knows the classes that describe tensors; a pickle that names anything else is refused before it does anything."""

    def find_class(self, module: str, name: str) -> Any:
        plain_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if plain_type or (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which no checkpoint needs")


def read_metadata(store: Store, name: str, files: Files) -> Metadata:
    """DCP's description of a checkpoint's tensors. Raises Damaged where it is not what was written, or asks for code."""
    where = f"{store.path(name)}/{METADATA}"
    with store.checked(name, METADATA, files) as stream:
        try:
            out = _Unpickler(stream).load()
        except Exception as error:  # a pickle that is not ours raises anything
            raise damaged(where, f"was not written by this program ({error})") from None
    if not isinstance(out, Metadata) or not isinstance(out.storage_data, dict):
        raise damaged(where, "was not written by this program")
    for info in out.storage_data.values():
        if getattr(info, "relative_path", None) not in files:
            raise damaged(where, "points to a file that does not belong to this checkpoint")
    return out


def differences(state: dict[str, Any], metadata: Metadata) -> list[str]:
    """How the tensors of a checkpoint differ from those of a run, a line each: missing, unknown, of another shape."""
    own, _ = flatten_state_dict(state)
    held = metadata.state_dict_metadata
    out = [f"{key} is not in it" for key in own if key not in held]
    out += [f"{key} is in it, but not in this model" for key in held if key.startswith("model.") and key not in own]
    for key, value in own.items():
        there = held.get(key)
        if isinstance(value, torch.Tensor) and isinstance(there, TensorStorageMetadata) and value.shape != there.size:
            out.append(f"{key} is {list(there.size)} in it, here {list(value.shape)}")
    return out


class _Files(FileSystemBase):
    """The file system that DCP sees: one checkpoint of a store. `files` has the size and digest of what was written."""

    def __init__(self, store: Store, place: str, files: Files):
        self.store, self.place, self.files = store, place, files
        self.held: dict[str, io.BytesIO] = {}  # written under a name that will change

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        file = str(path)
        if mode == "rb":
            with self.store.checked(self.place, file, self.files) as stream:
                yield stream
        elif file.endswith(".tmp"):
            self.held[file] = io.BytesIO()
            yield Hashed(self.held[file])
        else:
            with self.store.write(self.place, file) as below:
                hashed = Hashed(below)
                try:
                    yield hashed
                except RuntimeError:  # torch's zip writer has one of its own where a write fails
                    if hashed.error is None:
                        raise
                    raise hashed.error from None
            self.files[file] = [hashed.size, hashed.digest.hexdigest()]

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        data = self.held.pop(str(path)).getvalue()
        with self.create_stream(new_path, "wb") as stream:
            stream.write(data)

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return suffix

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        """`Store.begin` has made it."""

    def exists(self, path: str | os.PathLike) -> bool:
        return False  # `Store.begin` has emptied it

    def rm_file(self, path: str | os.PathLike) -> None:
        raise NotImplementedError

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class Writer(FileSystemWriter):
    """Writes to a place of a store; `files` is filled with what this process wrote."""

    def __init__(self, store: Store, place: str):
        super().__init__(place, sync_files=False)  # the store does it
        self.files: Files = {}
        self.fs, self.path = _Files(store, place, self.files), place  # type: ignore[assignment]


class Reader(FileSystemReader):
    """Reads a checkpoint of a store; each file is compared with its digest before anything of it is used."""

    def __init__(self, store: Store, name: str, files: Files, metadata: Metadata):
        super().__init__(name)
        self.fs, self.path, self.metadata = _Files(store, name, files), name, metadata  # type: ignore[assignment]

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self.metadata


class Planner(DefaultLoadPlanner):
    """DCP's own, but values that are no tensors are loaded without executing pickles."""

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise Damaged(
                f"{read_item.dest_index.fqn}: is no plain value, so this checkpoint was not written by this program"
            ) from None
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def fill(state: dict[str, Any], reader: Reader, where: str, alone: bool) -> None:
    """Load a checkpoint into `state`, in place. Raises UserError with what DCP wraps into an exception of its own."""
    try:
        dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=alone)
    except (Exception, CheckpointException) as error:  # DCP's own is no Exception
        failures = [e for e, _ in getattr(error, "failures", {}).values()] or [error]
        known = next((e for e in failures if isinstance(e, UserError)), None)
        if known is not None:
            raise known from None
        text = " ".join(str(failures[0]).split()) or type(failures[0]).__name__
        raise damaged(where, f"cannot be loaded ({text})") from None
