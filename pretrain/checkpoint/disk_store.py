"""Checkpoints on a disk that all ranks share.

A checkpoint is written to `FOLDER/.000001000.partial`, made durable, and then renamed to `FOLDER/000001000`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import DataError
from common.untrusted import is_number
from data_pipeline.storage.ranges import MissingFile
from pretrain.checkpoint.store import CHECKPOINT_FILES, RUN_JSON, Store

INTERRUPTED = re.compile(r"\.(\d{9})\.(partial|old)")  # folders of an interrupted save or deletion


class DiskStore(Store):
    """Checkpoints as folders on a disk that all ranks share."""

    def location(self) -> str:
        return str(Path(self.url).absolute())

    def names(self) -> list[str]:
        root = Path(self.url)
        return sorted(p.name for p in root.iterdir() if is_number(p.name)) if root.is_dir() else []

    def begin(self, name: str) -> str:
        partial = f".{name}.partial"
        root = Path(self.url)
        root.mkdir(parents=True, exist_ok=True)
        for path in root.iterdir():
            if found := INTERRUPTED.fullmatch(path.name):
                _delete_checkpoint_files(path, root / found[1])
        (root / partial).mkdir()
        return partial

    @contextlib.contextmanager
    def write(self, folder: str, file: str) -> Iterator[IO[bytes]]:
        with Path(self.url, folder, file).open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self, folder: str, name: str, run_json: bytes) -> None:
        with self.write(folder, RUN_JSON) as file:
            file.write(run_json)
        partial, final, replaced = Path(self.url, folder), Path(self.url, name), Path(self.url, f".{name}.old")
        fsync(partial)
        if final.exists():  # the run was resumed from an earlier step, and has reached this step again
            final.rename(replaced)
        partial.rename(final)
        fsync(final.parent)
        if replaced.exists():
            _delete_checkpoint_files(replaced, final)

    def abandon(self, name: str) -> None:
        if (partial := Path(self.url, f".{name}.partial")).is_dir():
            _delete_checkpoint_files(partial, Path(self.url, name))

    @contextlib.contextmanager
    def read(self, name: str, file: str) -> Iterator[io.RawIOBase]:
        path = Path(self.url, name, file)
        try:
            stream = path.open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFile(f"{path}: no such file") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        with stream:
            yield stream

    def size(self, folder: str, file: str) -> int | None:
        path = Path(self.url, folder, file)
        return path.stat().st_size if path.is_file() else None

    def put(self, file: str, data: bytes) -> None:
        temporary = Path(self.url, f".{file}.new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(Path(self.url, file))
        fsync(temporary.parent)

    def delete_file(self, file: str) -> None:
        Path(self.url, file).unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        folder, hidden = Path(self.url, name), Path(self.url, f".{name}.old")
        if (folder / RUN_JSON).is_file():
            folder.rename(hidden)
            _delete_checkpoint_files(hidden, folder)
        else:
            _delete_checkpoint_files(folder, folder)


def _delete_checkpoint_files(folder: Path, visible: Path) -> None:
    """Delete a checkpoint's files from `folder`, and the folder if nothing else is in it. If `folder` is a hidden one,
    other files in it are moved to the folder `visible`, unless it has a file of that name."""
    for path in list(folder.iterdir()):
        if CHECKPOINT_FILES.fullmatch(path.name) and not path.is_dir():
            path.unlink()
        elif folder != visible:
            visible.mkdir(exist_ok=True)
            if not (visible / path.name).exists():
                path.rename(visible / path.name)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def fsync(path: Path) -> None:
    """Make the bytes of a file durable, or the entries of a folder, so that created and renamed files survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
