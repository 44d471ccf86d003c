"""Checkpoints in a remote object store, accessed through fsspec (s3://…, gs://…).

An object store cannot rename a folder. Therefore `run.json` is the last object of a checkpoint that is written and the
first that is deleted: a checkpoint without `run.json` counts as incomplete.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import IO, Any

from common.errors import DataError
from common.untrusted import is_number
from data_pipeline.storage.ranges import MissingFile, with_retries
from data_pipeline.storage.urls import open_store
from pretrain.checkpoint.integrity import SizedReader
from pretrain.checkpoint.store import CHECKPOINT_FILES, RUN_JSON, Store

UPLOAD_PART_BYTES = 32 << 20  # S3 accepts at most 10,000 parts per object; with this size, an object of 335 GB
ABORT_SECONDS = 5.0  # time for which the deletion of the parts of a failed upload is retried
# The time limit of a request grows with its size, so that a connection of this speed can finish it.
MIN_BYTES_PER_SECOND = 1e6


class RemoteStore(Store):
    """Checkpoints as objects under a prefix. A failed request is retried for `retry_seconds`."""

    read_attempts = 3  # a digest mismatch may be an error of the network, which a second read corrects

    def __init__(self, url: str, retry_seconds: float = 60.0):
        super().__init__(url, retry_seconds)
        self.fs, self.root = open_store(self.url)

    def _object_path(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self.root, name, file) if part)

    def names(self) -> list[str]:
        def list_folder() -> list[str]:
            self.fs.invalidate_cache()
            try:
                return self.fs.ls(self.root, detail=False)
            except FileNotFoundError:
                return []

        found = with_retries(self.url, list_folder, self.retry_seconds)
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if is_number(name))

    def begin(self, name: str) -> str:
        self.delete(name)
        return name

    @contextlib.contextmanager
    def write(self, folder: str, file: str) -> Iterator[IO[bytes]]:
        upload = Upload(self, self._object_path(folder, file))
        try:
            yield upload  # type: ignore[misc]
            upload.finish()
        except BaseException:
            upload.abort()
            raise

    def publish(self, folder: str, name: str, run_json: bytes) -> None:
        self._upload(self._object_path(name, RUN_JSON), run_json)

    def put(self, file: str, data: bytes) -> None:
        self._upload(self._object_path("", file), data)

    def _upload(self, path: str, data: bytes) -> None:
        self.request(path, lambda: self.fs.pipe_file(path, data), len(data))

    def request(self, path: str, call: Callable[[], Any], size: int = 0) -> Any:
        """Return the result of `call`, which transfers `size` bytes of the object at `path`. A failed call is
        retried."""
        return with_retries(f"{self.url}: {path}", call, self.retry_seconds + size / MIN_BYTES_PER_SECOND)

    @contextlib.contextmanager
    def read(self, name: str, file: str) -> Iterator[io.RawIOBase]:
        path, size = self._object_path(name, file), self.size(name, file)
        if size is None:
            raise MissingFile(f"{self.url}: {path}: no such object")

        def download(begin: int, end: int) -> bytes:
            def fetch() -> bytes:
                data = self.fs.cat_file(path, start=begin, end=end)
                if len(data) != end - begin:
                    raise OSError(f"the store returned only {len(data)} of {end - begin} bytes")
                return data

            return self.request(path, fetch, end - begin)

        yield Download(size, download)

    def size(self, folder: str, file: str) -> int | None:
        def fetch_size() -> int | None:
            self.fs.invalidate_cache()
            try:
                return int(self.fs.info(self._object_path(folder, file))["size"])
            except FileNotFoundError:
                return None

        return with_retries(f"{self.url}/{folder}/{file}", fetch_size, self.retry_seconds)

    def delete_file(self, file: str) -> None:
        def delete_object() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._object_path("", file))

        with_retries(self.url, delete_object, self.retry_seconds)

    def delete(self, name: str) -> None:
        def delete_objects() -> None:
            self.fs.invalidate_cache()
            try:
                paths = self.fs.ls(self._object_path(name), detail=False)
            except FileNotFoundError:
                return
            paths = [path for path in paths if CHECKPOINT_FILES.fullmatch(path.rpartition("/")[2])]
            run_json_first = sorted(paths, key=lambda path: not path.endswith(f"/{RUN_JSON}"))
            for path in run_json_first:  # without run.json, the checkpoint counts as incomplete
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm_file(path)

        with_retries(f"{self.url}/{name}", delete_objects, self.retry_seconds)


class Download(SizedReader):
    """A readable and seekable file whose content is an object of `size` bytes.

    `read(begin, end)` requests a range of bytes from the store; each call of `readinto` makes one such request.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]):
        self.size, self.read_range = size, read

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        data = self.read_range(self.position, end)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class Upload(io.RawIOBase):
    """A writable file whose content becomes an object. Each part is uploaded as soon as it is full (multipart upload),
    so that memory holds only a few parts, and no local disk is needed.

    A failed upload of a part is retried. If the whole upload cannot be completed, DataError is raised, and `Saver`
    writes the checkpoint again from its beginning.
    """

    def __init__(self, store: RemoteStore, path: str):
        self.store, self.path = store, path
        self.buffer = bytearray()  # bytes that do not fill a part yet
        self.target: Any = None  # fsspec's file, opened when the first part is full
        self.busy = False  # whether the upload of a part is still running, perhaps in a thread that was abandoned

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        count = len(view)
        while len(view) >= (room := UPLOAD_PART_BYTES - len(self.buffer)):
            self.buffer += view[:room]
            view = view[room:]
            self._upload_part(bytes(self.buffer))
            self.buffer = bytearray()
        self.buffer += view
        return count

    def finish(self) -> None:
        """Upload the last bytes and complete the upload, which makes the object visible."""
        if self.target is None:
            self.store._upload(self.path, bytes(self.buffer))
            return
        self.target.write(self.buffer)  # fsspec only buffers it, since it does not fill a part
        self.store.request(self.path, lambda: self._once(self.target.close), len(self.buffer))

    def abort(self) -> None:
        """Ask the store to delete the parts that have been uploaded. Errors are ignored."""
        if self.target is not None:
            with contextlib.suppress(Exception):  # not every store has `discard`
                with_retries(self.store.url, lambda: self._once(self.target.discard), ABORT_SECONDS)
            self.target.closed = True  # otherwise fsspec would complete the upload when Python deletes the file object

    def _upload_part(self, part: bytes) -> None:
        handed_over = False  # whether `part` is already in the buffer of fsspec's file

        def upload() -> None:
            nonlocal handed_over
            if self.busy:  # the previous attempt timed out, but its thread may still be running
                raise DataError(f"{self.store.url}: {self.path}: the store did not answer the upload of a part in time")
            self.busy = True
            try:
                if self.target is None or self.target.closed:  # fsspec closes its file if the upload cannot begin
                    self.target = self.store.fs.open(self.path, "wb", block_size=UPLOAD_PART_BYTES)
                    handed_over = False
                if handed_over:
                    self.target.flush()  # uploads the part that fsspec still holds
                else:
                    handed_over = True
                    self.target.write(part)  # starts the upload, since the part fills fsspec's block
            finally:
                self.busy = False

        self.store.request(self.path, upload, len(part))

    def _once(self, call: Callable[[], Any]) -> None:
        """Call a method of fsspec's file that must not be retried: its errors become DataError, which ends the
        retries.
        """
        try:
            call()
        except Exception as error:  # the exceptions of fsspec's stores have no common base class
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.store.url}: {self.path}: the upload failed ({reason})") from None
