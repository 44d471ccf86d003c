"""Store: the folder that holds a run's checkpoints, on a disk or in any store that fsspec knows (s3://…). Nothing here imports torch.

    FOLDER/latest              the name of the checkpoint to go on from; moves only when that checkpoint is durable
    FOLDER/000001000/run.json  written last: step, stream, recipe, versions, and size and xxh3-128 of every other file
    FOLDER/000001000/.metadata, __RANK_N.distcp   torch's distributed checkpoint (DCP)

On a disk a checkpoint is written to `.000001000.partial` and renamed; in a store, which cannot rename, run.json is the object that makes it visible.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from data_pipeline.fetch import Missing, patiently
from data_pipeline.storage import DataError, is_local, open_store
from pretrain.errors import UserError

ABOUT, LATEST = "run.json", "latest"
IN_MEMORY = 64 << 20  # bytes of a file on its way to or from a store; more goes to a temporary file
PIECE = 8 << 20
Files = dict[str, list]  # name -> [bytes, xxh3-128]


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


def name_of(step: int) -> str:
    return f"{step:09d}"


def damaged(where: str, what: str) -> Damaged:
    return Damaged(
        f"{where}: {what}; this checkpoint cannot be used: go on from another with checkpoint.resume=FOLDER/STEP,"
        " or from the start with checkpoint.resume=none"
    )


class Hashed(io.RawIOBase):
    """A stream that counts and hashes what is written, before it goes on to `below`."""

    def __init__(self, below: IO[bytes]):
        self.below, self.size, self.digest = below, 0, xxhash.xxh3_128()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        try:
            self.below.write(view)
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.below.flush()

    def fileno(self) -> int:
        return self.below.fileno()


class Store:
    """`open_folder(url)` gives one. `seconds`: how long a request to a remote store is tried again."""

    looks = 1  # at a file whose bytes are not what was written

    def __init__(self, url: str, seconds: float = 60.0):
        self.url, self.seconds = url.rstrip("/"), seconds

    # ------------------------------------------------ what each kind of store does in its own way
    def names(self) -> list[str]:
        """Numbered folders, whole or not, in order."""
        raise NotImplementedError

    def begin(self, name: str) -> str:
        """Where to write a checkpoint; what an attempt before this one has left there is gone."""
        raise NotImplementedError

    def write(self, place: str, file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file to write; it is durable when the context ends without an error."""
        raise NotImplementedError

    def publish(self, place: str, name: str, about: bytes) -> None:
        """Write run.json and make the checkpoint visible under its name."""
        raise NotImplementedError

    def read(self, name: str, file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """A file to read and seek in. Raises DataError where there is none."""
        raise NotImplementedError

    def size(self, place: str, file: str) -> int | None:
        """Bytes of a file; None where there is none."""
        raise NotImplementedError

    def put(self, file: str, data: bytes) -> None:
        """Write a small file of the folder itself, atomically."""
        raise NotImplementedError

    def drop(self, file: str) -> None:
        """Delete a small file of the folder itself."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Delete a checkpoint; one that is half deleted is not taken for whole."""
        raise NotImplementedError

    # ------------------------------------------------ what they have in common
    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def whole(self) -> list[str]:
        """The names of complete checkpoints, in order."""
        return [name for name in self.names() if self.size(name, ABOUT) is not None]

    def latest(self) -> str | None:
        """The name that the last durable save has left; without it the newest complete one."""
        try:
            with self.read("", LATEST) as file:
                name = file.read(64).decode(errors="replace").strip()
        except Missing:
            return max(self.whole(), default=None)
        if not name.isdigit() or self.size(name, ABOUT) is None:
            raise damaged(f"{self.url}/{LATEST}", f"names {name!r}, which is not a complete checkpoint in this folder")
        return name

    def point(self, name: str) -> None:
        self.put(LATEST, f"{name}\n".encode())

    def about(self, name: str) -> dict[str, Any]:
        """run.json of a checkpoint. Raises Damaged where it is missing or not what was written."""
        where = f"{self.path(name)}/{ABOUT}"
        try:
            with self.read(name, ABOUT) as file:
                about = json.loads(file.read())
            digest = about.pop("digest")
        except Missing:
            raise damaged(where, "is missing, so the checkpoint is not complete or is none of this program's") from None
        except (ValueError, KeyError, AttributeError):
            raise damaged(where, "is damaged or was not written by this program") from None
        if digest != digest_of(about):
            raise damaged(where, "is damaged: its content does not match its digest")
        return about

    def problems(self, name: str, files: Files) -> list[str]:
        """What is wrong with a checkpoint's files, a line each, from sizes alone."""
        out = []
        for file, (size, _) in files.items():
            found = self.size(name, file)
            if found != size:
                seen = "is missing" if found is None else f"has {found} bytes where {size} were written"
                out.append(f"{self.path(name)}/{file}: {seen}")
        return out

    @contextlib.contextmanager
    def checked(self, name: str, file: str, files: Files) -> Iterator[IO[bytes]]:
        """A file to read, when all of its bytes have been compared with the digest in run.json."""
        where = f"{self.path(name)}/{file}"
        if file not in files or "/" in file:
            raise damaged(where, "does not belong to this checkpoint")
        try:
            for left in reversed(range(self.looks)):
                with self.read(name, file) as stream:
                    size, digest = hash_of(stream)
                    if [size, digest] == files[file][:2]:
                        stream.seek(0)
                        yield stream
                        return
                if not left and size != files[file][0]:
                    raise damaged(where, f"has {size} bytes where {files[file][0]} were written")
            raise damaged(where, "is damaged: its bytes do not match their digest")
        except Missing:
            raise damaged(where, "is missing") from None


def digest_of(about: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def hash_of(stream: IO[bytes]) -> tuple[int, str]:
    """(bytes, xxh3-128) of the rest of a stream."""
    size, digest = 0, xxhash.xxh3_128()
    while piece := stream.read(PIECE):
        size += len(piece)
        digest.update(piece)
    return size, digest.hexdigest()


def open_folder(url: str | Path, seconds: float = 60.0) -> Store:
    url = str(url)
    if is_local(url):
        return Disk(url.removeprefix("file://").removeprefix("local://"), seconds)
    return Remote(url, seconds)


class Disk(Store):
    """Checkpoints as folders of a disk that all processes share."""

    def names(self) -> list[str]:
        root = Path(self.url)
        return sorted(p.name for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []

    def begin(self, name: str) -> str:
        place = f".{name}.partial"
        root = Path(self.url)
        root.mkdir(parents=True, exist_ok=True)
        for rest in (*root.glob(".*.partial"), *root.glob(".*.old")):  # of attempts that were killed
            shutil.rmtree(rest, ignore_errors=True)
        (root / place).mkdir()
        return place

    @contextlib.contextmanager
    def write(self, place: str, file: str) -> Iterator[IO[bytes]]:
        with Path(self.url, place, file).open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self, place: str, name: str, about: bytes) -> None:
        with self.write(place, ABOUT) as file:
            file.write(about)
        partial, final = Path(self.url, place), Path(self.url, name)
        sync(partial)
        if final.exists():  # of a run that was told to go on from before it
            self.remove(name)
        partial.rename(final)
        sync(final.parent)

    @contextlib.contextmanager
    def read(self, name: str, file: str) -> Iterator[IO[bytes]]:
        path = Path(self.url, name, file)
        try:
            stream = path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise Missing(f"{path}: no such file") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        with stream:
            yield stream

    def size(self, place: str, file: str) -> int | None:
        path = Path(self.url, place, file)
        return path.stat().st_size if path.is_file() else None

    def put(self, file: str, data: bytes) -> None:
        temporary = Path(self.url, f".{file}.new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(Path(self.url, file))
        sync(temporary.parent)

    def drop(self, file: str) -> None:
        Path(self.url, file).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        gone = Path(self.url, f".{name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        Path(self.url, name).rename(gone)
        shutil.rmtree(gone)


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class Remote(Store):
    """Checkpoints as objects under a prefix. Every request is tried again until `seconds` are over."""

    looks = 3  # bytes change on the way, too

    def __init__(self, url: str, seconds: float = 60.0):
        super().__init__(url, seconds)
        self.fs, self.root = open_store(self.url)

    def _inside(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self.root, name, file) if part)

    def names(self) -> list[str]:
        def ask() -> list[str]:
            self.fs.invalidate_cache()
            try:
                return self.fs.ls(self.root, detail=False)
            except FileNotFoundError:
                return []

        found = (path.rstrip("/").rpartition("/")[2] for path in patiently(self.url, ask, self.seconds))
        return sorted(name for name in found if name.isdigit())

    def begin(self, name: str) -> str:
        self.remove(name)
        return name

    @contextlib.contextmanager
    def write(self, place: str, file: str) -> Iterator[IO[bytes]]:
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as stream:
            yield stream  # type: ignore[misc]

            def send() -> None:
                stream.seek(0)
                with self.fs.open(self._inside(place, file), "wb") as target:
                    shutil.copyfileobj(stream, target, PIECE)

            patiently(f"{self.url}/{place}/{file}", send, self.seconds)

    def publish(self, place: str, name: str, about: bytes) -> None:
        self._send(self._inside(name, ABOUT), about)

    def put(self, file: str, data: bytes) -> None:
        self._send(self._inside("", file), data)

    def _send(self, path: str, data: bytes) -> None:
        patiently(f"{self.url}: {path}", lambda: self.fs.pipe_file(path, data), self.seconds)

    @contextlib.contextmanager
    def read(self, name: str, file: str) -> Iterator[IO[bytes]]:
        path = self._inside(name, file)
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as stream:

            def fetch() -> None:
                stream.seek(0)
                stream.truncate()
                self.fs.invalidate_cache()
                with self.fs.open(path, "rb") as source:
                    shutil.copyfileobj(source, stream, PIECE)

            patiently(f"{self.url}: {path}", fetch, self.seconds)
            stream.seek(0)
            yield stream  # type: ignore[misc]

    def size(self, place: str, file: str) -> int | None:
        def ask() -> int | None:
            self.fs.invalidate_cache()
            try:
                return int(self.fs.info(self._inside(place, file))["size"])
            except FileNotFoundError:
                return None

        return patiently(f"{self.url}/{place}/{file}", ask, self.seconds)

    def drop(self, file: str) -> None:
        patiently(self.url, lambda: self.fs.rm_file(self._inside("", file)), self.seconds)

    def remove(self, name: str) -> None:
        def delete() -> None:
            self.fs.invalidate_cache()
            for path in (self._inside(name, ABOUT), self._inside(name)):  # what makes it visible goes first
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm(path, recursive=True)

        patiently(f"{self.url}/{name}", delete, self.seconds)
