"""`Store`: the folder that holds a run's checkpoints, on a disk (`disk_store.py`) or in a bucket (`remote_store.py`).
`open_store.py` opens one by its URL. This module does not import torch.

    FOLDER/owner.json          the run that the checkpoints belong to; no other run may write to this folder
    FOLDER/latest              the name of the checkpoint to resume from; updated when that checkpoint is durable
    FOLDER/000001000/run.json  written last: step, stream, recipe, versions, and size and digests of all other files
    FOLDER/000001000/.metadata, __RANK_N.distcp   torch's distributed checkpoint (DCP)

A checkpoint without run.json is incomplete. Deleting a checkpoint deletes only the files named above; other files in
its folder are kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Collection, Iterator
from typing import IO, Any

from common.errors import UserError
from common.untrusted import is_number, loads, schema_error
from data_pipeline.storage.ranges import MissingFile
from pretrain.checkpoint.integrity import Damaged, Files, VerifyingReader, damaged_error, run_json_digest
from pretrain.recipes.sections import BATCH_SCHEMA

RUN_JSON, LATEST, OWNER = "run.json", "latest", "owner.json"
CHECKPOINT_FILES = re.compile(r"run\.json|\.metadata|__\d+_\d+\.distcp")  # names of the files in a checkpoint's folder
MAX_RUN_JSON_BYTES = 64 << 20
READ_BUFFER_BYTES = 64 << 10
RUN_JSON_SCHEMA = {  # see `schema_error`; further keys are allowed
    **{"step": int, "?encoder": str, "processes": int, "versions": {...: str}, "files": {...: [(int, str)]}},
    "data": [{"samples": int, "shards": object, "id": str}],
    "stream": {"step": int, "data": str, "order": str},
    "recipe": {
        **{"steps": int, "precision": str, "model": {"name": str}, "objective": {"name": str}, "optim": {"lr": dict}},
        "data": {"batch": BATCH_SCHEMA, "mean": [float], "std": [float]},
    },
}


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"{step:09d}"


class Store:
    """The folder of a run's checkpoints. A failed request to a remote store is retried for `retry_seconds`."""

    read_attempts = 1  # how often a part of a file is read before a digest mismatch is reported

    def __init__(self, url: str, retry_seconds: float = 60.0):
        self.url, self.retry_seconds = url.rstrip("/"), retry_seconds

    # ------------------------------------------------ methods of each kind of store
    def names(self) -> list[str]:
        """The names of all checkpoint folders, incomplete ones too, in order of their steps."""
        raise NotImplementedError

    def begin(self, name: str) -> str:
        """Prepare to write a checkpoint, and delete the files of an interrupted attempt. Returns the name of the folder
        for its files."""
        raise NotImplementedError

    def write(self, folder: str, file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file to write; it is durable once the context has ended without an error."""
        raise NotImplementedError

    def publish(self, folder: str, name: str, run_json: bytes) -> None:
        """Write run.json, and make the checkpoint in `folder` visible under its name."""
        raise NotImplementedError

    def abandon(self, name: str) -> None:
        """Delete what a failed attempt has written. A remote store, which may not answer, keeps it until the next attempt to
        write this checkpoint."""

    def read(self, name: str, file: str) -> contextlib.AbstractContextManager[io.RawIOBase]:
        """An unbuffered file to read and seek in: each read requests its range of bytes from the store. Raises
        DataError, and MissingFile if the file does not exist."""
        raise NotImplementedError

    def size(self, folder: str, file: str) -> int | None:
        """The size of a file in bytes, or None if it does not exist."""
        raise NotImplementedError

    def put(self, file: str, data: bytes) -> None:
        """Write a small file next to the checkpoints (`latest`, owner.json), atomically."""
        raise NotImplementedError

    def delete_file(self, file: str) -> None:
        """Delete a small file next to the checkpoints, if it exists."""
        raise NotImplementedError

    def delete(self, name: str) -> None:
        """Delete a checkpoint. If this is interrupted, the rest of the checkpoint counts as incomplete."""
        raise NotImplementedError

    # ------------------------------------------------ common methods
    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def location(self) -> str:
        """The URL or, for a folder on a disk, its absolute path."""
        return self.url

    def complete_names(self) -> list[str]:
        """The names of the complete checkpoints, in order of their steps."""
        return [name for name in self.names() if self.size(name, RUN_JSON) is not None]

    def latest(self) -> str | None:
        """The name in the file `latest`, or of the newest complete checkpoint if there is no such file. Raises Damaged
        if `latest` names no complete checkpoint."""
        try:
            with self.read("", LATEST) as file:
                name = file.read(64).decode(errors="replace").strip()
        except MissingFile:
            return max(self.complete_names(), default=None)
        if not is_number(name) or self.size(name, RUN_JSON) is None:
            raise damaged_error(
                f"{self.url}/{LATEST}", f"names {name!r}, which is not a complete checkpoint in this folder"
            )
        return name

    def set_latest(self, name: str) -> None:
        self.put(LATEST, f"{name}\n".encode())

    def owner(self) -> dict[str, str] | None:
        """{"id", "folder"} of the run that the checkpoints belong to; None if there are no checkpoints.

        Read from owner.json, or from the newest readable run.json if there is no such file. The id is empty for
        checkpoints of an earlier version without ids; both are empty if no run.json can be read.
        """
        try:
            with self.read("", OWNER) as file:
                owner = loads(file.read(1 << 16))
            return {"id": str(owner["id"]), "folder": str(owner["folder"])}
        except MissingFile:
            pass
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.url}/{OWNER}: is damaged or was not written by this program; if the checkpoints belong to"
                " this run, delete this file; otherwise choose another checkpoint.folder"
            ) from None
        names = self.complete_names()
        for name in reversed(names):
            with contextlib.suppress(Damaged):
                run_json = self.run_json(name)
                return run_json.get("run") or {"id": "", "folder": run_json["recipe"]["run"]}
        return {"id": "", "folder": ""} if names else None

    def check_latest(self) -> None:
        """Raises UserError if something else than this program has written a file `latest` here, which the first
        checkpoint would replace."""
        with contextlib.suppress(MissingFile), self.read("", LATEST) as file:
            if not re.fullmatch(rb"\d{9,18}\n?", file.read(64)):
                raise UserError(
                    f"{self.url}/{LATEST}: was not written by this program, which writes a file of this name beside its"
                    " checkpoints; choose another checkpoint.folder"
                )

    def is_of_another_run(self, name: str, ids: Collection[str | None]) -> bool:
        """Whether a complete checkpoint states that a run whose id is not among `ids` has written it."""
        try:
            owner = self.run_json(name).get("run")
        except Damaged:
            return False
        return owner is not None and owner["id"] not in ids

    def set_owner(self, owner: dict[str, str]) -> None:
        """Write owner.json."""
        self.put(OWNER, json.dumps(owner).encode())

    def delete_all(self, new_owner: dict[str, str] | None) -> None:
        """Delete all checkpoints, then write owner.json for a new run; with None owner.json is deleted, too."""
        self.delete_file(LATEST)
        for name in self.names():
            if name == checkpoint_name(int(name)):  # this program names no checkpoint otherwise
                self.delete(name)
        if new_owner is None:
            self.delete_file(OWNER)
        else:
            self.set_owner(new_owner)

    def run_json(self, name: str) -> dict[str, Any]:
        """The content of a checkpoint's run.json. Raises Damaged if it is missing or not what was written."""
        where = f"{self.path(name)}/{RUN_JSON}"
        try:
            with self.read(name, RUN_JSON) as file:
                run_json = loads(file.read(MAX_RUN_JSON_BYTES))
            digest = run_json.pop("digest")
        except MissingFile:
            raise damaged_error(
                where, "is missing, so the checkpoint is incomplete or was not written by this program"
            ) from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise damaged_error(where, "is damaged or was not written by this program") from None
        if digest != run_json_digest(run_json):
            raise damaged_error(where, "is damaged: its content does not match its digest")
        if wrong := schema_error(run_json, RUN_JSON_SCHEMA):
            raise damaged_error(where, f"was not written by this program ({wrong})")
        return run_json

    def wrong_sizes(self, name: str, files: Files) -> list[str]:
        """One line for each file of a checkpoint that is missing or has another size than was written."""
        lines = []
        for file, (size, *_) in files.items():
            found = self.size(name, file)
            if found != size:
                problem = "is missing" if found is None else f"has {found} bytes where {size} were written"
                lines.append(f"{self.path(name)}/{file}: {problem}")
        return lines

    @contextlib.contextmanager
    def read_verified(self, name: str, file: str, files: Files) -> Iterator[IO[bytes]]:
        """A file to read and seek in. Only the parts that are read are taken from the store, and each is compared with
        its digest in run.json before it is used. Raises Damaged, here or when it is read."""
        where = f"{self.path(name)}/{file}"
        if file not in files or "/" in file:
            raise damaged_error(where, "does not belong to this checkpoint")
        try:
            with self.read(name, file) as source:
                reader = VerifyingReader(source, where, files[file], self.read_attempts)
                try:
                    yield io.BufferedReader(reader, READ_BUFFER_BYTES)
                except Exception:  # torch's zip reader raises its own in place of an error of ours
                    if reader.error is None:
                        raise
                    raise reader.error from None
        except MissingFile:
            raise damaged_error(where, "is missing") from None
