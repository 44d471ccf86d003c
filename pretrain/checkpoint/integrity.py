"""Sizes and digests of a checkpoint's files, and the error for a file that does not match them. This module does not
import torch."""

from __future__ import annotations

import io
import json
from typing import IO, Any

import xxhash

from common.errors import UserError

CHUNK_BYTES = 8 << 20  # size of a chunk of a file; each chunk has a digest, and is read and verified as a whole
# The entry "files" of run.json: {name of a file: [size in bytes, xxh3-128 of the file, joined xxh3-64 of its chunks]}.
# Checkpoints of earlier versions lack the third value.
Files = dict[str, list]


class Damaged(UserError):
    """A checkpoint has changed since it was written."""


def damaged_error(where: str, what: str) -> Damaged:
    """The error for a checkpoint whose file `where` is damaged. `what`: the problem, as the rest of the sentence."""
    return Damaged(
        f"{where}: {what}; this checkpoint cannot be used: resume from another one with checkpoint.resume=FOLDER/STEP,"
        " or train from the start with checkpoint.resume=none"
    )


class Digests:
    """Computes the size and the digests of a file whose bytes are passed to `update` in order."""

    def __init__(self) -> None:
        self.size, self._file, self._chunk = 0, xxhash.xxh3_128(), xxhash.xxh3_64()
        self._chunks: list[str] = []  # digests of the complete chunks

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
        self.error: OSError | None = None  # the error of a failed write to `target`

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
    """Base class of readable and seekable files of `size` bytes. Subclasses read at `position` and advance it."""

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
    """A readable and seekable file of a checkpoint. It reads only the chunks that are needed from `source`, an
    unbuffered stream, and compares each chunk with its digest before returning any of its bytes. Raises Damaged.

    `entry`: the file's value in `Files`. `attempts`: how often a chunk is read before a digest mismatch is an error.
    """

    def __init__(self, source: io.RawIOBase, where: str, entry: list, attempts: int):
        self.source, self.where, self.attempts = source, where, attempts
        self.size = entry[0]
        self.error: Exception | None = None  # the last error of a read
        self._number, self._data = -1, b""  # number and bytes of the chunk that was read last
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
        """The bytes of a chunk; fewer if the stream ends early."""
        self.source.seek(number * CHUNK_BYTES)
        parts, missing = [], min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)
        while missing and (data := self.source.read(missing)):
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _digests_of_chunks(self, entry: list) -> str:
        """For a checkpoint of an earlier version, which has no digests of chunks: read the whole file, compare it with
        its digest, and return the digests of its chunks."""
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
    """The xxh3-128 of all other entries of run.json, which run.json holds as "digest"."""
    return xxhash.xxh3_128_hexdigest(json.dumps(run_json, sort_keys=True).encode())
