"""Sizes and digests of a checkpoint's files, and the error for a file that does not match them. Does not import
torch."""

from __future__ import annotations

import io
import json
from typing import IO, Any

import xxhash

from common.errors import UserError

CHUNK_BYTES = 8 << 20  # of a file, with a digest of its own: what is read and verified at a time
# {name of a file: [bytes, xxh3-128, the xxh3-64 of each CHUNK_BYTES, joined]}, the entry "files" of run.json; without the
# third value in checkpoints of earlier versions
Files = dict[str, list]


class Damaged(UserError):
    """A checkpoint is not as it was written."""


def damaged_error(where: str, what: str) -> Damaged:
    """The error for a checkpoint whose file `where` is not as it was written; `what` is the rest of the sentence."""
    return Damaged(
        f"{where}: {what}; this checkpoint cannot be used: resume from another one with checkpoint.resume=FOLDER/STEP,"
        " or train from the start with checkpoint.resume=none"
    )


class Digests:
    """Size and digests of a file whose bytes come one after the other."""

    def __init__(self) -> None:
        self.size, self._file, self._chunk = 0, xxhash.xxh3_128(), xxhash.xxh3_64()
        self._chunks: list[str] = []  # of complete chunks

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._file.update(view)
        while len(view):
            part = view[: CHUNK_BYTES - self.size % CHUNK_BYTES]
            self._chunk.update(part)
            self.size += len(part)
            view = view[len(part) :]
            if self.size % CHUNK_BYTES == 0:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk = xxhash.xxh3_64()

    def entry(self) -> list:
        """The file's value in `Files`."""
        last = [self._chunk.hexdigest()] if self.size % CHUNK_BYTES else []
        return [self.size, self._file.hexdigest(), "".join(self._chunks + last)]


class HashingWriter(io.RawIOBase):
    """A stream that counts and hashes the bytes that are written to it, and writes them to `target`."""

    def __init__(self, target: IO[bytes]):
        self.target, self.digests = target, Digests()
        self.error: OSError | None = None  # of a write to `target`

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digests.update(view)
        try:
            self.target.write(view)
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def tell(self) -> int:
        return self.digests.size

    def flush(self) -> None:
        self.target.flush()

    def fileno(self) -> int:
        return self.target.fileno()


class SizedReader(io.RawIOBase):
    """A file of `size` bytes to read and seek in; subclasses read at `position` and advance it."""

    size: int
    position: int = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position


class VerifyingReader(SizedReader):
    """A file of a checkpoint to read and seek in. Of `source`, an unbuffered stream, it reads whole chunks, only those that
    are asked for, and compares each with its digest before any of it is used. Raises Damaged.

    `entry`: the file's value in `Files`. `attempts`: how often a chunk is read before a digest mismatch is reported.
    """

    def __init__(self, source: io.RawIOBase, where: str, entry: list, attempts: int):
        self.source, self.where, self.attempts = source, where, attempts
        self.size = entry[0]
        self.error: Exception | None = None  # the last one that was raised
        self._number, self._data = -1, b""  # the last chunk that was read
        found = source.seek(0, io.SEEK_END)
        if found != self.size:
            raise damaged_error(where, f"has {found} bytes where {self.size} were written")
        self._digests = entry[2] if len(entry) > 2 else self._digests_of_chunks(entry)

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.size:
            return 0
        number, begin = divmod(self.position, CHUNK_BYTES)
        try:
            data = memoryview(self._chunk(number))[begin:]
        except Exception as error:
            self.error = error
            raise
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self.position += count
        return count

    def _chunk(self, number: int) -> bytes:
        if number != self._number:
            expected = self._digests[16 * number : 16 * number + 16]
            for _ in range(self.attempts):
                data = self._read(number)
                if xxhash.xxh3_64_hexdigest(data) == expected:
                    self._number, self._data = number, data
                    break
            else:
                raise damaged_error(self.where, "is damaged: its bytes do not match their digest")
        return self._data

    def _read(self, number: int) -> bytes:
        """A chunk as it is in the file; shorter if the file ends before."""
        self.source.seek(number * CHUNK_BYTES)
        out, left = [], min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)
        while left and (data := self.source.read(left)):
            out.append(data)
            left -= len(data)
        return b"".join(out)

    def _digests_of_chunks(self, entry: list) -> str:
        """For a checkpoint of an earlier version: the digests of the chunks of a file that as a whole has its digest."""
        for _ in range(self.attempts):
            digests = Digests()
            for number in range(-(-self.size // CHUNK_BYTES)):
                digests.update(self._read(number))
            found = digests.entry()
            if found[:2] == entry[:2]:
                return found[2]
        raise damaged_error(self.where, "is damaged: its bytes do not match their digest")


def hash_stream(stream: IO[bytes]) -> list:
    """The value in `Files` for the rest of a stream."""
    digests = Digests()
    while data := stream.read(CHUNK_BYTES):
        digests.update(data)
    return digests.entry()


def run_json_digest(run_json: dict[str, Any]) -> str:
    """The xxh3-128 that run.json holds of its own other entries."""
    return xxhash.xxh3_128_hexdigest(json.dumps(run_json, sort_keys=True).encode())
