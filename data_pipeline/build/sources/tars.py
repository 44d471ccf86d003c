"""WebDataset tars as sources. Members that shards can hold are copied, others are counted, and samples that cannot be
used are listed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

import xxhash

from common.errors import DataError
from common.untrusted import open_tar
from data_pipeline.build.sources.source import IMAGE_OPTIONS, SPLIT, Block, Entry, Source, class_order, member_of
from data_pipeline.build.sources.source_files import File, Tree, reason_of
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.members import (
    DOTS_ADVICE,
    INDEXED_EXTENSIONS,
    MAX_MEMBER_BYTES,
    MEMBER_NAME,
    SEVERAL_DOTS,
    check_extensions,
    is_dotted,
    member_extensions,
)

OUR_FILES = re.compile(r"manifest\.json$|meta\.json$|bad\.jsonl$|(index|seconds)-\w+\.bin$")
MAX_FOLDERS = 1 << 16  # a tar with more folders has no labels from folders
Group = list[tuple[tarfile.TarInfo, str]]  # the members of one sample and their extensions


class Tars(Source):
    """WebDataset tars. Pieces: see `survey` and `blocks`."""

    kind = "webdataset"
    title = "WebDataset shards"
    reads: tuple[str, ...] = IMAGE_OPTIONS

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension == "tar"

    def unread(self) -> list[File]:
        """The files that are neither tars nor files that `shards build` writes beside tars."""
        return [file for file in self.other_files() if not OUR_FILES.match(file.path.rpartition("/")[2])]

    _built = False  # whether `shards build` wrote the tars; their labels are not changed then

    def begin(self) -> None:
        """Read the names of labels and the options for decoding images from the manifest of the source, if it has
        one."""
        url = self.tree.url.rpartition("/")[0] if self.tree.single_file else self.tree.url
        try:
            manifest = load_manifest(url)
        except DataError:
            return
        if manifest:
            self.classes, self._built = manifest.classes, "build" in manifest.details
            further = list(check_extensions(manifest.extensions))
            self.options = replace(self.options, **{**manifest.pixels, **self.options.pixels}, further=further)

    def files_to_survey(self) -> list[str]:
        return [file.path for file in self.files]

    def survey(self, path: str) -> dict[str, Any]:
        """Survey a tar by its headers only.

        Pieces: [path, first byte, end byte, {offset: reason why the sample there is left out}].
        """
        tar = TarSamples(self.tree, path, further=self.options.further)
        cutter, seen, folders = _BlockCutter(path, self.limit), set[str](), set[str]()
        start, used, labelled = -1, False, False  # of the current sample: first byte, whether it is used
        try:
            for key, group in tar.groups():
                start, used = group[0][0].offset, self.uses(key)
                if used:
                    copied = (member for member, extension in group if self._copies(extension))
                    cutter.add(start, sum(member.size + 1024 for member in copied))
                    if key in seen:
                        cutter.faults[start] = f"the key {key} occurs twice in this tar; the first one is used"
                seen.add(key)
                labelled = labelled or any(extension == "cls" for _, extension in group)
                if len(folders) < MAX_FOLDERS:
                    folders.add("/".join(_folders(key)))
                cutter.end = tar.end_of(group)
        except (OSError, tarfile.TarError) as error:
            tar.problem = reason_of(error)
        bad = []
        if tar.problem and used:
            cutter.faults[start] = f"{tar.problem}, so this last sample may be incomplete"
        elif tar.problem:
            bad = [[path, tar.problem]]
        blocks = [list(block) for block in cutter.blocks()]
        return {"blocks": blocks, "bad": bad, "labels": [], "labelled": labelled, "folders": sorted(folders)}

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        """The blocks. If folders are the labels, each piece ends with the number of folders above the class folders."""
        depth = self._label_depth(list(surveys.values()))
        for block in super().blocks(surveys):
            yield block if depth is None else block._replace(piece=[*block.piece, depth])

    def _label_depth(self, surveys: list[dict[str, Any]]) -> int | None:
        """The number of folders above the class folder in a key, if the folders are labels because no sample has a .cls
        member; None if they are not."""
        folders = sorted({tuple(name.split("/")) if name else () for survey in surveys for name in survey["folders"]})
        unusable = any(survey["labelled"] or len(survey["folders"]) == MAX_FOLDERS for survey in surveys)
        if self._built or unusable or not folders:
            return None
        # The first and the last of the sorted paths differ at the depth at which any two paths differ first.
        first, last = folders[0], folders[-1]
        depth = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        names = {folder[depth] for folder in folders if len(folder) > depth}
        if len(names) < 2:
            return None
        if all(SPLIT.fullmatch(name) for name in names):
            self.notes.append(
                f"the samples are in the folders {', '.join(sorted(names))}: parts of a data set, and not labels;"
                " all samples become one shard set"
            )
            return None
        self.classes = class_order(names)
        self.notes.append("no sample has a .cls member: the labels are the folders of the samples")
        return depth

    def uses(self, key: str) -> bool:
        """Whether the sample with this key becomes part of the shards."""
        return True

    def _copies(self, extension: str) -> bool:
        """Whether members with an extension become part of the shards."""
        return extension in INDEXED_EXTENSIONS or extension in self.options.further

    def entries(self, piece: list[Any]) -> Iterator[Entry]:
        path, begin, end, faults, *depth = piece
        numbers = {name: number for number, name in enumerate(self.classes)}
        with self.tree.open(path) as file:
            file.seek(begin)
            tar = TarSamples(self.tree, path, file, self.options.further)
            for key, group in tar.groups(end):
                if self.uses(key):
                    entry = self._entry(path, key, group, faults.get(str(group[0][0].offset), ""), file)
                    label = next(iter(_folders(key)[depth[0] :]), "") if depth else ""
                    if label in numbers and not entry.reason:
                        entry.members["cls"] = str(numbers[label]).encode()
                    yield entry

    def _entry(self, path: str, key: str, group: Group, reason: str, file: IO[bytes]) -> Entry:
        where, members, dropped = f"{path}/{key}", dict[str, bytes](), list[str]()
        for member, ending in group:
            extension = member_of(ending)
            if not member.isreg() or not self._copies(extension):
                dropped.append(extension if member.isreg() else "link")
            elif extension in members:
                reason = reason or f"holds two .{extension} members"
            elif member.issparse():
                reason = reason or f"{extension}: is a sparse file, which is not read"
            elif member.size > MAX_MEMBER_BYTES:
                reason = reason or f"{extension}: holds {member.size} bytes, but at most {MAX_MEMBER_BYTES} are allowed"
            elif not reason:
                position = file.tell()
                file.seek(member.offset_data)
                members[extension] = file.read(member.size)
                file.seek(position)
                if len(members[extension]) < member.size:
                    reason = f"{extension}: only {len(members[extension])} of {member.size} bytes exist"
        if not members and not reason:
            reason = "holds no member that shards can hold"
            if any(is_dotted(ending, self.options.further) for _, ending in group):
                reason += f"; {SEVERAL_DOTS}: {DOTS_ADVICE}"
        return Entry(where, key.strip("/"), {} if reason else members, reason, tuple(dropped))


class TarSubset(Tars):
    """The samples whose key has a hash in [low, high). They are copied unchanged, with their keys: see split.py."""

    kind = "part"
    empty = "none of its keys is in this share of the hashes; write a larger share"
    decodes = False

    def _label_depth(self, surveys: list[dict[str, Any]]) -> int | None:
        return None  # samples are copied unchanged, without new labels

    def uses(self, key: str) -> bool:
        return self.options.low <= key_fraction(key) < self.options.high

    def _entry(self, path: str, key: str, group: Group, reason: str, file: IO[bytes]) -> Entry:
        if ".." in key.split("/"):
            reason = reason or "its key is a path that leads out of a folder"
        return super()._entry(path, key, group, reason, file)

    def key(self, number: int, entry: Entry) -> str:
        return entry.name


def _folders(key: str) -> list[str]:
    """The folders in the key of a sample."""
    return [part for part in key.split("/")[:-1] if part not in ("", ".", "..")]


def key_fraction(key: str) -> float:
    """A hash of a key as a number in [0, 1)."""
    return (xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape")) >> 11) / (1 << 53)


class TarSamples:
    """The samples of one tar in order. A sample is a group of consecutive members with the same key.

    `further`: extensions of members that are read in addition to INDEXED_EXTENSIONS. `problem`: why the tar ends too
    early; "" if it does not.
    """

    def __init__(self, tree: Tree, path: str, file: IO[bytes] | None = None, further: Sequence[str] = ()):
        self.tree, self.path, self.file, self.further, self.problem = tree, path, file, further, ""

    def groups(self, end: int | None = None) -> Iterator[tuple[str, Group]]:
        """(key, members) of the samples up to byte `end`. Raises OSError and TarError if the tar cannot be opened."""
        if self.file is not None:
            yield from self._groups(self.file, end)
            return
        with self.tree.open(self.path) as file:
            yield from self._groups(file, end)

    def _groups(self, file: IO[bytes], end: int | None) -> Iterator[tuple[str, Group]]:
        key, group = "", Group()
        with open_tar(file) as tar:
            for member in self._members(tar, end):
                match = MEMBER_NAME.match(member.name)
                member_key, ending = (match[1], match[2].lower()) if match else (member.name, "")
                if group and member_key != key:
                    yield key, self._with_extensions(group)
                    group = Group()
                key = member_key
                group.append((member, ending))
            if end is None:
                file.seek(tar.offset)
                end_mark = file.read(512)
                if len(end_mark) < 512 or any(end_mark):
                    self.problem = self.problem or f"the tar breaks off at byte {tar.offset}"
        if group:
            yield key, self._with_extensions(group)

    def _members(self, tar: tarfile.TarFile, end: int | None) -> Iterator[tarfile.TarInfo]:
        position = -1  # after the last member; not tar.offset, because opening a tar reads its first header
        while end is None or position < end:
            try:
                member = tar.next()
                position = tar.offset
            except tarfile.TarError as error:
                self.problem = f"the tar breaks off ({error})"
                return
            if member is None:
                return
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
            if not member.isdir():
                yield member

    def end_of(self, group: Group) -> int:
        """The byte after a sample's last member and its padding."""
        member = group[-1][0]
        return member.offset_data + -(-member.size // 512) * 512

    def _with_extensions(self, group: Group) -> Group:
        """The group with the extensions under which members are indexed. Members that are left out keep their
        endings."""
        endings = (ending for member, ending in group if member.isreg())
        regular = iter(member_extensions(endings, self.further))
        return [(member, (next(regular) or ending) if member.isreg() else ending) for member, ending in group]


class _BlockCutter:
    """Divides the samples of one tar into blocks of at most `limit` bytes.

    `faults`: {first byte of a sample: why it is left out}; `end`: the byte after the last sample.
    """

    def __init__(self, path: str, limit: int):
        self.path, self.limit = path, limit
        self.faults: dict[int, str] = {}
        self.end = 0
        self._blocks: list[tuple[int, int, int]] = []  # (first byte in the tar, size in a shard, rows) of each block

    def add(self, start: int, size: int) -> None:
        """Add the sample that begins at byte `start` of the tar, and takes `size` bytes of a shard."""
        if self._blocks and self._blocks[-1][1] + size <= self.limit:
            first, block_size, rows = self._blocks[-1]
            self._blocks[-1] = (first, block_size + size, rows + 1)
        else:
            self._blocks.append((start, size, 1))

    def blocks(self) -> Iterator[Block]:
        ends = [first for first, _, _ in self._blocks[1:]] + [self.end]
        for (first, size, rows), end in zip(self._blocks, ends, strict=False):
            faults = {str(offset): why for offset, why in self.faults.items() if first <= offset < end}
            yield Block(size, rows, [self.path, first, end, faults])
