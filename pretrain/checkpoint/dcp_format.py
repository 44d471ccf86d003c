"""Reads and writes the files of torch's distributed checkpoint (DCP) through a `Store`, with a digest of every file and
without executing pickles.

DCP unpickles `.metadata` and every value that is not a tensor (`torch.load(weights_only=False)`), so that anybody who
can write to a checkpoint could run code in the process that loads it. Here `.metadata` may name only the classes in
ALLOWED_CLASSES, and values are loaded with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
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
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from common.errors import UserError
from pretrain.checkpoint.integrity import Damaged, Files, HashingWriter, damaged_error
from pretrain.checkpoint.store import Store

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process has no process group
METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint."
ALLOWED_CLASSES = {  # (module, name) of the classes that a pickle in .metadata may use
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
    """Unpickles only classes that describe tensors. A pickle that names anything else raises UnpicklingError before any
    of it is executed."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it uses {module}.{name}, which no checkpoint needs")


def read_metadata(store: Store, name: str, files: Files) -> Metadata:
    """DCP's description of a checkpoint's tensors. Raises Damaged if the file has changed since it was written, or
    names a class that is not allowed."""
    where = f"{store.path(name)}/{METADATA}"
    with store.read_verified(name, METADATA, files) as stream:
        try:
            metadata = _Unpickler(stream).load()
        except Exception as error:  # a foreign pickle may raise any exception
            raise damaged_error(where, f"was not written by this program ({error})") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise damaged_error(where, "was not written by this program")
    if not _describes_tensors(metadata, sum(size for size, *_ in files.values())):
        raise damaged_error(where, "was not written by this program")
    for info in metadata.storage_data.values():
        if getattr(info, "relative_path", None) not in files:
            raise damaged_error(where, "points to a file that does not belong to this checkpoint")
    return metadata


def _describes_tensors(metadata: Metadata, stored_bytes: int) -> bool:
    """Whether the metadata describe tensors by name, with no more elements in total than the checkpoint has bytes."""
    if not isinstance(metadata.state_dict_metadata, dict):
        return False
    elements = 0
    for name, entry in metadata.state_dict_metadata.items():
        size = getattr(entry, "size", ())
        if not isinstance(name, str) or not isinstance(size, tuple) or not all(type(n) is int and n >= 0 for n in size):
            return False
        elements += math.prod(size)
    return elements <= stored_bytes


def differences(state: dict[str, Any], metadata: Metadata) -> list[str]:
    """The differences between the tensors of a checkpoint and those of a run, a line for each tensor that is missing,
    unexpected or of another shape."""
    own, _ = flatten_state_dict(state)
    stored = metadata.state_dict_metadata
    lines = [f"{key} is not in it" for key in own if key not in stored]
    lines += [f"{key} is in it, but not in this model" for key in stored if key.startswith("model.") and key not in own]
    for key, value in own.items():
        entry = stored.get(key)
        if isinstance(value, torch.Tensor) and isinstance(entry, TensorStorageMetadata) and value.shape != entry.size:
            lines.append(f"{key} is {list(entry.size)} in it, and {list(value.shape)} in this run")
    return lines


class _CheckpointFileSystem(FileSystemBase):
    """The file system that DCP sees: the folder of one checkpoint in a store.

    `files` holds the size and the digests of each file: when reading, those that the file must have; when writing,
    those of the files that have been written.
    """

    def __init__(self, store: Store, folder: str, files: Files):
        self.store, self.folder, self.files = store, folder, files
        self.temporary: dict[str, io.BytesIO] = {}  # the content of files that DCP is going to rename

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        file = str(path)
        if mode == "rb":
            with self.store.read_verified(self.folder, file, self.files) as stream:
                yield stream
        elif file.endswith(".tmp"):
            self.temporary[file] = io.BytesIO()
            yield HashingWriter(self.temporary[file])
        else:
            with self.store.write(self.folder, file) as target:
                writer = HashingWriter(target)
                try:
                    yield writer
                except RuntimeError:  # torch's zip writer raises it in place of the OSError of a failed write
                    if writer.error is None:
                        raise
                    raise writer.error from None
            self.files[file] = writer.digests.entry()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        data = self.temporary.pop(str(path)).getvalue()
        with self.create_stream(new_path, "wb") as stream:
            stream.write(data)

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return suffix

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        """Does nothing: `Store.begin` has made the folder."""

    def exists(self, path: str | os.PathLike) -> bool:
        return False  # `Store.begin` has emptied the folder

    def rm_file(self, path: str | os.PathLike) -> None:
        raise NotImplementedError

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class Writer(FileSystemWriter):
    """Writes to a folder of a store. Afterwards `files` holds size and digests of the files that this rank has
    written."""

    def __init__(self, store: Store, folder: str):
        super().__init__(folder, sync_files=False)  # the store makes files durable
        self.files: Files = {}
        self.fs, self.path = _CheckpointFileSystem(store, folder, self.files), folder  # type: ignore[assignment]


class Reader(FileSystemReader):
    """Reads the parts of a checkpoint that this rank needs, and compares them with their digests before they are
    used."""

    def __init__(self, store: Store, name: str, files: Files, metadata: Metadata):
        super().__init__(name)
        self.fs, self.path = _CheckpointFileSystem(store, name, files), name  # type: ignore[assignment]
        self.metadata = metadata

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read as DCP does, but in the order of the values in the files, so that no chunk of a file is read twice."""

        def position(item: ReadItem) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        return super().read_data(dataclasses.replace(plan, items=sorted(plan.items, key=position)), planner)


class Planner(DefaultLoadPlanner):
    """DCP's planner, except that values that are not tensors are loaded without executing pickles."""

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise Damaged(
                f"{read_item.dest_index.fqn}: its pickle uses classes that are not allowed, so this checkpoint was not"
                " written by this program"
            ) from None
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def fill(state: dict[str, Any], reader: Reader, where: str, alone: bool) -> None:
    """Fill `state`, in place, with the values of a checkpoint. `alone`: load in this process only; otherwise the call
    is collective. Error messages begin with `where`.

    Raises UserError, also if DCP has wrapped it into an exception of its own.
    """
    try:
        dcp.load(state, storage_reader=reader, planner=Planner(), no_dist=alone)
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        failures = [e for e, _ in getattr(error, "failures", {}).values()] or [error]
        user_error = next((e for e in failures if isinstance(e, UserError)), None)
        if user_error is not None:
            raise user_error from None
        text = " ".join(str(failures[0]).split()) or type(failures[0]).__name__
        raise damaged_error(where, f"cannot be loaded ({text})") from None
