"""Other WebDataset tars, read anew: what shards may hold is taken, the rest counted; samples that are not whole are named."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import xxhash

from data_pipeline import index
from data_pipeline.index import MEMBER_NAME, MEMBERS
from data_pipeline.sources.base import Block, Entry, File, Source, Tree, failure
from data_pipeline.storage import DataError

OURS = re.compile(r"manifest\.json$|meta\.json$|bad\.jsonl$|index-\w+\.bin$")
Group = list[tuple[tarfile.TarInfo, str]]  # the members of one sample and their extensions


class Tars(Source):
    kind = "webdataset"
    title = "WebDataset shards"

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension == "tar"

    def unread(self) -> list[File]:
        """What is neither a tar nor written by ourselves beside tars."""
        return [file for file in self.others() if not OURS.match(file.path.rpartition("/")[2])]

    def begin(self) -> None:
        self.classes = self.class_names()

    def class_names(self) -> list[str]:
        """The names that the source's own manifest gives its labels."""
        url = self.tree.url.rpartition("/")[0] if self.tree.only else self.tree.url
        try:
            held = index.load(url)
        except DataError:
            return []
        return held.classes if held else []

    def looked_into(self) -> list[str]:
        return [file.path for file in self.files]

    def survey(self, path: str) -> dict[str, Any]:
        """Pieces [path, first byte, last byte, {offset: why the sample there is left out}]; only headers are read."""
        walk, out, seen = Walk(self.tree, path), _Cut(path, self.limit), set()
        last, taken = -1, False
        try:
            for key, group in walk.groups():
                start, taken = group[0][0].offset, self.wants(key)
                last = start
                if taken:
                    out.add(start, sum(member.size + 1024 for member, extension in group if extension in MEMBERS))
                    if key in seen:
                        out.faults[start] = f"the key {key} stands in this tar twice; the first is taken"
                seen.add(key)
                out.end = walk.end_of(group)
        except (OSError, tarfile.TarError) as error:
            walk.problem = failure(error)
        if walk.problem and taken:
            out.faults[last] = f"{walk.problem}, so this last sample may be half of one"
        bad = [[path, walk.problem]] if walk.problem and not (taken and last >= 0) else []
        return {"blocks": [list(block) for block in out.blocks()], "bad": bad, "labels": []}

    def wants(self, key: str) -> bool:
        return True

    def entries(self, piece: list[Any]) -> Iterator[Entry]:
        path, begin, end, faults = piece
        with self.tree.open(path) as file:
            file.seek(begin)
            walk = Walk(self.tree, path, file)
            for key, group in walk.groups(end):
                if self.wants(key):
                    yield self._entry(path, key, group, faults.get(str(group[0][0].offset), ""), file)

    def _entry(self, path: str, key: str, group: Group, reason: str, file: IO[bytes]) -> Entry:
        where, members, dropped = f"{path}/{key}", {}, []
        for member, extension in group:
            if not member.isreg() or extension not in MEMBERS:
                dropped.append(extension if member.isreg() else "link")
            elif extension in members:
                reason = reason or f"holds two .{extension} members"
            elif member.size > index.MAX_MEMBER_BYTES:
                reason = reason or f"{extension}: {member.size} bytes, but {index.MAX_MEMBER_BYTES} are allowed"
            elif not reason:
                here = file.tell()
                file.seek(member.offset_data)
                members[extension] = file.read(member.size)
                file.seek(here)
                if len(members[extension]) < member.size:
                    reason = f"{extension}: {len(members[extension])} of {member.size} bytes are there"
        if not members and not reason:
            reason = "holds no member that shards keep"
        return Entry(where, key.strip("/"), {} if reason else members, reason, tuple(dropped))


class TarsPart(Tars):
    """The samples whose key hashes to [low, high), under their own keys and as they are: see split.py."""

    kind = "part"
    empty = "none of its keys falls into this share; write a larger one"
    decodes = False

    def wants(self, key: str) -> bool:
        return self.options.low <= share(key) < self.options.high

    def _entry(self, path: str, key: str, group: Group, reason: str, file: IO[bytes]) -> Entry:
        if ".." in key.split("/"):
            reason = reason or "its key is a path that leads out of a folder"
        return super()._entry(path, key, group, reason, file)

    def key(self, number: int, entry: Entry) -> str:
        return entry.name


def share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return (xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape")) >> 11) / (1 << 53)


class Walk:
    """The samples of one tar in order: consecutive members of one key. `problem` says why the tar ended too early."""

    def __init__(self, tree: Tree, path: str, file: IO[bytes] | None = None):
        self.tree, self.path, self.file, self.problem = tree, path, file, ""

    def groups(self, end: int | None = None) -> Iterator[tuple[str, Group]]:
        """(key, members) up to byte `end`. Raises OSError and TarError where the tar cannot be opened."""
        if self.file is not None:
            yield from self._groups(self.file, end)
            return
        with self.tree.open(self.path) as file:
            yield from self._groups(file, end)

    def _groups(self, file: IO[bytes], end: int | None) -> Iterator[tuple[str, Group]]:
        key, group = "", Group()
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in self._members(tar, end):
                match = MEMBER_NAME.match(member.name)
                mine, extension = (match[1], match[2].lower()) if match else (member.name, "")
                if group and mine != key:
                    yield key, group
                    group = Group()
                key = mine
                group.append((member, extension))
            if end is None:
                file.seek(tar.offset)
                mark = file.read(512)
                if len(mark) < 512 or any(mark):
                    self.problem = self.problem or f"the tar breaks off at byte {tar.offset}"
        if group:
            yield key, group

    def _members(self, tar: tarfile.TarFile, end: int | None) -> Iterator[tarfile.TarInfo]:
        reached = -1  # not tar.offset from the beginning: opening a tar reads its first header
        while end is None or reached < end:
            try:
                member = tar.next()
                reached = tar.offset
            except tarfile.TarError as error:
                self.problem = f"the tar breaks off ({error})"
                return
            if member is None:
                return
            tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
            if not member.isdir():
                yield member

    def end_of(self, group: Group) -> int:
        """The byte after a sample's last member and its padding."""
        member = group[-1][0]
        return member.offset_data + -(-member.size // 512) * 512


class _Cut:
    """Samples of one tar gathered to blocks of `limit` bytes."""

    def __init__(self, path: str, limit: int):
        self.path, self.limit = path, limit
        self.faults: dict[int, str] = {}
        self.end = 0
        self._starts: list[tuple[int, int, int]] = []  # first byte, bytes, rows of each block
        self._ends: list[int] = []

    def add(self, start: int, size: int) -> None:
        if self._starts and self._starts[-1][1] + size <= self.limit:
            first, before, rows = self._starts[-1]
            self._starts[-1] = (first, before + size, rows + 1)
            return
        if self._starts:
            self._ends.append(start)
        self._starts.append((start, size, 1))

    def blocks(self) -> Iterator[Block]:
        for (first, size, rows), end in zip(self._starts, [*self._ends, self.end], strict=False):
            faults = {str(offset): why for offset, why in self.faults.items() if first <= offset < end}
            yield Block(size, rows, [self.path, first, end, faults])
