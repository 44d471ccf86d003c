"""The files of a source: a folder or a single file, on a local disk or in a remote store, compressed or not."""

from __future__ import annotations

import errno
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

from common.errors import DataError, UserError, is_bug
from common.untrusted import open_binary, read_binary
from data_pipeline.shards.members import MAX_MEMBER_BYTES
from data_pipeline.storage.urls import is_local, open_store

READ_ERRORS = (OSError, EOFError, zlib.error)  # exceptions that reading or decompressing a file may raise


class File(NamedTuple):
    """A file of a source, with its path below the root of the source, separated by "/"."""

    path: str
    size: int
    version: str  # modification time or etag

    @property
    def extension(self) -> str:
        return extension(self.path)


class Tree:
    """The files of a source: those in a folder, or a single file, given by a URL or a path. Hidden files are skipped.

    Methods take paths relative to the folder `root`. `single_file` is "" if the source is a folder.
    """

    def __init__(self, url: str):
        self.url = url.removeprefix("file://")
        self.local = is_local(url)
        if self.local:
            self.url = os.path.abspath(os.path.expanduser(self.url))
        self.fs, path = open_store(self.url)
        self.root, self.single_file = path.rstrip("/"), ""
        with as_data_error(self.url):
            if not self.fs.isdir(path):
                if not self.fs.isfile(path):
                    raise DataError(f"{url}: no such file or folder")
                self.root, _, self.single_file = path.rpartition("/")

    @cached_property
    def files(self) -> list[File]:
        """All files, sorted by path, without hidden files and the content of hidden folders."""
        if self.local:
            return [self._stat(self.single_file)] if self.single_file else sorted(self._walk())
        return [file for file in self._listed.values() if not self.single_file or file.path == self.single_file]

    @cached_property
    def _listed(self) -> dict[str, File]:
        """{path: file} of all files of a remote tree."""
        out = {}
        with as_data_error(self.url):
            found = self.fs.find(self.full_path(self.single_file) if self.single_file else self.root, detail=True)
        for full_path, info in sorted(found.items()):
            path = full_path[len(self.root) :].lstrip("/")
            version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("created") or ""
            if info["type"] == "file" and not any(part.startswith(".") for part in path.split("/")):
                out[path] = File(path, int(info.get("size") or 0), str(version))
        return out

    def _walk(self) -> Iterator[File]:
        """Yield the files of a local folder. Links to folders are followed, except those that lead to a folder that
        contains them, which would never end.
        """

        def fail(error: OSError) -> None:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

        # For each folder that is still to be visited: the identities of the folders that contain it.
        ancestors_of = {self.root: frozenset[tuple[int, int]]()}
        for folder, subfolders, names in os.walk(self.root, onerror=fail, followlinks=True):
            ancestors = ancestors_of.pop(folder) | {_identity(folder)}
            if folder == self.root or os.path.islink(folder):  # the folders that contain the target of the link
                ancestors |= {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}
            for name in list(subfolders):
                path = os.path.join(folder, name)
                if name.startswith(".") or _leads_back(path, ancestors):
                    subfolders.remove(name)  # `os.walk` does not visit it then
                else:
                    ancestors_of[path] = ancestors
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for name in names:
                if not name.startswith("."):
                    yield self._stat(name if relative == "." else f"{relative}/{name}")

    def _stat(self, path: str) -> File:
        try:
            info = os.stat(self.full_path(path))
        except OSError:
            return File(path, 0, "missing")  # for example a broken link; reading the file raises the error
        return File(path, info.st_size, str(info.st_mtime_ns))

    def stat(self, path: str) -> File:
        """The size and the version of a file, which may be outside the tree if a list names it; size 0 if it is
        missing.
        """
        if self.local:
            return self._stat(path)
        try:
            info = self.fs.info(self.full_path(path))
        except OSError:
            return File(path, 0, "missing")
        return File(path, int(info.get("size") or 0), str(info.get("ETag") or info.get("etag") or ""))

    def full_path(self, path: str) -> str:
        """The absolute path of a file of the tree, or its path in the remote store."""
        return os.path.join(self.root, path) if self.local else f"{self.root}/{path}"

    def open(self, path: str) -> IO[bytes]:
        """Open a file for reading, and decompress it if its name says that it is compressed. Raises OSError, also for a
        FIFO or a device.
        """
        raw = open_binary(self.full_path(path)) if self.local else self.fs.open(self.full_path(path), "rb")
        return decompressed(path, raw)

    def read(self, path: str) -> bytes:
        """The bytes of a file, decompressed. Raises OSError; its errno is EFBIG for more than MAX_MEMBER_BYTES."""
        if (size := self.stat(path).size) > MAX_MEMBER_BYTES:
            raise OSError(errno.EFBIG, f"holds {size} bytes, but at most {MAX_MEMBER_BYTES} are allowed")
        if is_compressed(path):
            with self.open(path) as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
            if len(data) > MAX_MEMBER_BYTES:
                too_large = f"holds more than the {MAX_MEMBER_BYTES} bytes that are allowed, when it is decompressed"
                raise OSError(errno.EFBIG, too_large)
            return data
        if not self.local:
            return self.fs.cat_file(self.full_path(path))
        return read_binary(self.full_path(path), MAX_MEMBER_BYTES)


@contextmanager
def as_data_error(url: str) -> Iterator[None]:
    """Convert the exceptions of a store to DataError. Each store raises exceptions of its own for missing credentials,
    an unreachable network and so on; they have no common base class.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise DataError(f"{url}: cannot be reached ({reason_of(error)})") from None
    except Exception as error:
        if is_local(url) or is_bug(error):
            raise
        raise DataError(f"{url}: cannot be reached ({type(error).__name__}: {reason_of(error)})") from None


def _identity(folder: str | Path) -> tuple[int, int]:
    """The device and inode numbers of a folder. They do not depend on the links by which it was reached."""
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def _leads_back(folder: str, ancestors: frozenset[tuple[int, int]]) -> bool:
    """Whether `folder` is a link to one of `ancestors`, the folders that contain it."""
    try:
        return os.path.islink(folder) and _identity(folder) in ancestors
    except OSError:
        return True  # the folder has been deleted in the meantime; skip it


def reason_of(error: Exception) -> str:
    """The text of an exception in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# ---------------------------------------------------------------- compressed files
COMPRESSIBLE = ("jsonl", "json", "csv", "tsv", "txt")  # extensions that may be followed by .gz or .zst


def extension(path: str) -> str:
    """The extension of a file name in lower case, without .gz or .zst after a compressible one: "jsonl" for
    `x.jsonl.gz`.
    """
    stem, dot, last = path.rpartition("/")[2].lower().rpartition(".")
    inner = stem.rpartition(".")[2]
    if last in ("gz", "zst") and inner in COMPRESSIBLE:
        return inner
    return last if dot else ""


def is_compressed(path: str) -> bool:
    """Whether the name of a file says that it is compressed, and that its content is of a known kind."""
    return path.lower().endswith((".gz", ".zst")) and extension(path) in COMPRESSIBLE


def decompressed(path: str, raw: Any) -> Any:
    """A file object for the decompressed content of `raw` if `path` is a compressed file, otherwise `raw` itself."""
    if not is_compressed(path):
        return raw
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: pyarrow, which decompresses .zst files, is not installed; run pip install 'unlabeled[parquet]'"
        ) from None
    return io.BufferedReader(_ForwardFile(pyarrow.CompressedInputStream(raw, "zstd")))  # type: ignore[arg-type]


class _ForwardFile(io.RawIOBase):
    """Makes a file of a stream that cannot seek: it seeks forward by reading, and raises OSError for seeking
    backward."""

    def __init__(self, stream: Any):
        self.stream, self.position = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        target = self.position + offset if whence == io.SEEK_CUR else offset
        if whence == io.SEEK_END or target < self.position:
            raise OSError("a compressed file can only be read forward; decompress it first")
        while self.position < target and self.read(min(1 << 20, target - self.position)):
            pass
        return self.position

    def readinto(self, target: Any) -> int:
        data = self.stream.read(len(target))
        target[: len(data)] = data
        self.position += len(data)
        return len(data)
