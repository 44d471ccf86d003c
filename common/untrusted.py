"""Read files, tars and JSON from untrusted sources. Whatever they contain, they cannot block the reader, fill its
memory, or raise exceptions other than those that the docstring of a function names.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from typing import IO, Any

MAX_HEADER_BYTES = 1 << 20  # limit of a long name or of pax records in a tar; usual ones have a few hundred bytes
MAX_JSON_DEPTH = 100
_KINDS = {  # file types that are refused, as the error messages call them
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises OSError, also for files that are not regular: reading a FIFO would block, and a device may have no end.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: do not wait for a FIFO's writer
    kind = stat.S_IFMT(os.fstat(number).st_mode)
    if kind != stat.S_IFREG:
        os.close(number)
        raise OSError(errno.EINVAL, f"is {_KINDS.get(kind, 'something else')}, not a regular file", os.fspath(path))
    return number


def open_binary(path: str | os.PathLike) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError."""
    return os.fdopen(open_regular(path), "rb")


def read_binary(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    Raises OSError, also if the file holds more than `max_bytes` bytes. The bytes are counted while they are read, since
    a file may hold more than the size that the file system states.
    """
    with open_binary(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"holds more than the {max_bytes} bytes that are allowed", os.fspath(path))
    return data


def read_text(path: str | os.PathLike, max_bytes: int = 64 << 20) -> str:
    """Return the UTF-8 text of a regular file of at most `max_bytes` bytes. Raises OSError or ValueError."""
    return read_binary(path, max_bytes).decode()


def loads(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises ValueError, also if it is nested more than MAX_JSON_DEPTH levels deep: code that walks through such a value
    recursively could exceed Python's recursion limit.
    """
    try:
        out = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep") from None
    level = [out]
    for _ in range(MAX_JSON_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        if not parts:
            return out
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")


def is_number(text: str) -> bool:
    """Whether a text consists of 1 to 18 ASCII digits, so that `int` accepts it and the number fits into 64 bits.

    `str.isdigit` alone is also true for "²" and for texts of 5000 digits, for which `int` raises ValueError.
    """
    return text.isascii() and text.isdigit() and len(text) <= 18


class Member(tarfile.TarInfo):
    """The header of a member of a tar. Reading it raises TarError for any damage; tarfile alone would take some damaged
    headers for the end of the tar.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Member:
        begin = tar.offset
        try:
            out = super().fromtarfile(tar)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            if begin == 0:
                raise
            raise tarfile.ReadError(f"{error} at byte {begin}") from None
        except (ValueError, IndexError, OverflowError, RecursionError) as error:
            raise tarfile.ReadError(f"the header at byte {begin} is damaged ({type(error).__name__})") from None
        if out.size < 0 or tar.offset <= begin:
            raise tarfile.ReadError(f"the header at byte {begin} states an impossible size, {out.size} bytes")
        return out

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        kinds = (
            *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if self.size < 0 or (self.type in kinds and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(
                f"the header at byte {self.offset} states a size of {self.size} bytes; long names and pax records may"
                f" have 0 to {MAX_HEADER_BYTES}"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def open_tar(file: IO[bytes], mode: Any = "r:", **options: Any) -> tarfile.TarFile:
    """Open a tar for `tar_members`; `mode` as in `tarfile.open`. Raises TarError and OSError."""
    return tarfile.open(fileobj=file, mode=mode, tarinfo=Member, **options)


def _skip_to_header(tar: tarfile.TarFile) -> None:
    """If the tar is read as a stream, read up to the next header. Raises TarError if the stream ends before it.

    tarfile's own seek does not notice the end of the stream, and loops over as many bytes as a header states.
    """
    stream: Any = tar.fileobj
    if not isinstance(stream, tarfile._Stream) or tar.firstmember is not None:  # type: ignore[attr-defined]
        return  # not a stream, or tarfile has read the first header on opening, and `tar.next` is to return it
    while (left := tar.offset - stream.tell()) > 0:
        if not stream.read(min(left, 1 << 20)):
            raise tarfile.ReadError("unexpected end of data")


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in order, without keeping them in memory. Raises TarError and OSError."""
    while True:
        _skip_to_header(tar)
        if (member := tar.next()) is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        yield member


def lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield (line, length of the line in bytes) for each line of a file.

    Of a line of more than `max_bytes` bytes, only the first `max_bytes` + 1 bytes are kept in memory and returned.
    """
    while line := file.readline(max_bytes + 1):
        size, piece = len(line), line
        while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
            size += len(piece)
        yield line, size


def schema_error(value: Any, schema: Any, where: str = "") -> str:
    """Compare a JSON value with a schema. Returns an error message about the first part that does not match, or "" if
    everything matches.

    `schema` is one of:
    - a type, or None for null;
    - a tuple of schemas, one of which has to match;
    - [schema]: a list whose items all match;
    - {name: schema}: an object with at least these names; a name that begins with "?" is optional;
    - {...: schema}: an object with any names, whose values all match.
    Numbers have to be finite and below 2^63 in magnitude. `where` is the path of the value in the whole JSON text.
    """
    if isinstance(schema, tuple):
        return (
            "" if any(not schema_error(value, option) for option in schema) else schema_error(value, schema[0], where)
        )
    if schema is None:
        return "" if value is None else f"{where or 'it'} is {type(value).__name__}, not null"
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{where or 'it'} is {type(value).__name__}, not a list"
        return next(
            (problem for n, item in enumerate(value) if (problem := schema_error(item, schema[0], f"{where}[{n}]"))), ""
        )
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{where or 'it'} is {type(value).__name__}, not an object"
        for name, inner in schema.items():
            if name is ...:
                parts = [(key, item, inner) for key, item in value.items()]
            elif name.removeprefix("?") in value:
                parts = [(name.removeprefix("?"), value[name.removeprefix("?")], inner)]
            elif name.startswith("?"):
                continue
            else:
                return f"{where + '.' if where else ''}{name} is missing"
            for key, item, kind in parts:
                if problem := schema_error(item, kind, f"{where + '.' if where else ''}{key}"):
                    return problem
        return ""
    if schema is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63
    elif schema is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    else:
        fits = isinstance(value, schema)
    return "" if fits else f"{where or 'it'} is {short_repr(value)}, not {schema.__name__}"


def short_repr(value: Any, max_chars: int = 60) -> str:
    """The `repr` of a value for an error message, cut to `max_chars` characters."""
    text = repr(value)
    return text if len(text) <= max_chars else f"{text[:max_chars]}…"
