"""Samples of a list of shards, by number: located by the index, read by byte range, and verified by their hash.

A shard is a plain tar. The members of one sample follow each other and share their name up to the first dot:
`0000007-oak.jpg`, `0000007-oak.cls` (the number of the label), `0000007-oak.json`. `tar` and `webdataset` can read
these shards.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from common import output
from common.errors import Absent, Damaged, DataError
from common.untrusted import is_number, open_tar, tar_members
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.image_formats import ARRAY, IMAGE_MEMBERS, MAX_PIXELS
from data_pipeline.formats.pixels import PixelDtype
from data_pipeline.shards.dataset import Part, Piece
from data_pipeline.shards.indexed_manifest import IndexedManifest, open_manifests
from data_pipeline.shards.manifest import Manifest, common_classes, dataset_id
from data_pipeline.shards.members import MEMBER_NAME, check_extensions, in_order, no_samples_message
from data_pipeline.shards.tar_scan import RECORD
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.storage.ranges import RangeReader

MAX_TRIED = 16  # samples from which the dtype and the number of channels of a set are found


class Samples:
    """All samples of the shards that `specs` name (folders, tars, globs; local or any fsspec URL), in order.

    `read` returns the bytes of the members, `image` a decoded image. `extensions` are those of all members in the set.
    An image of more than `max_pixels` counts as damaged. `further`: extensions that are indexed in addition to
    INDEXED_EXTENSIONS, if the shards have no index yet.
    """

    length = 0
    unit = "samples"

    def __init__(
        self,
        specs: Iterable[str],
        reader: RangeReader | None = None,
        say: Callable[[str], None] = output.say,
        max_pixels: int = MAX_PIXELS,
        further: Iterable[str] = (),
    ):
        specs, self.further = list(specs), check_extensions(further)
        self.specs, self.names, self.max_pixels = specs, ", ".join(specs), max_pixels
        self.reader = reader or RangeReader()
        self.manifests = [IndexedManifest(m, rows, self.reader) for m, rows in open_manifests(specs, say, self.further)]
        self.extensions = in_order(e for indexed in self.manifests for e in indexed.manifest.extensions)
        counts = np.concatenate(
            [indexed.manifest.counts[indexed.rows] for indexed in self.manifests] or [np.zeros(0, int)]
        )
        self.first = np.concatenate([[0], np.cumsum(counts)])  # sample number at which each shard begins
        # The number of the spec that each shard belongs to, and the number of the first shard of each spec.
        self._spec_of = np.repeat(np.arange(len(self.manifests)), [len(indexed.rows) for indexed in self.manifests])
        self._spec_first = np.concatenate([[0], np.cumsum([len(indexed.rows) for indexed in self.manifests])])
        if not len(self):
            raise DataError(
                f"{self.names or 'data'}: {no_samples_message(p.manifest.left_out for p in self.manifests)}"
            )

    def __len__(self) -> int:
        return int(self.first[-1])

    @cached_property
    def id(self) -> str:
        """A hash of every byte and of the order of the shards."""
        out = xxhash.xxh3_128()
        for indexed in self.manifests:
            manifest, rows = indexed.manifest, indexed.rows
            columns = (manifest.names, manifest.sizes, manifest.counts, manifest.hashes)
            all_shards = len(rows) == len(manifest.names)
            part_id = manifest.id if all_shards else dataset_id(*([column[row] for row in rows] for column in columns))
            out.update(part_id.encode())
        return out.hexdigest()

    @property
    def vocabulary(self) -> Vocabulary | None:
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which another process opens the same samples."""
        return {"specs": self.specs, "further": self.further}

    @property
    def total_bytes(self) -> int:
        return sum(int(indexed.manifest.sizes[indexed.rows].sum()) for indexed in self.manifests)

    def merged(self) -> Manifest:
        """One manifest of all specs. A shard is named N/NAME, where N is the number of its spec, so that the name does
        not depend on the place where the shard is stored. It has the names of the classes that `common_classes`
        returns."""
        shards = []
        for n, indexed in enumerate(self.manifests):
            rows = indexed.manifest.shards
            shards += [(f"{n}/{rows[i][0].rpartition('/')[2]}", *rows[i][1:]) for i in indexed.rows]
        names = [indexed.manifest.classes for indexed in self.manifests]
        found = common_classes(names)
        classes = {"classes": found} if found else {}
        return Manifest.of_shards(shards, self.extensions, {"specs": self.specs, **classes}, id=self.id)

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample."""
        shard = int(np.searchsorted(self.first, number, "right")) - 1
        return shard, number - int(self.first[shard])

    def location(self, number: int) -> tuple[str, int]:
        """(URL of the shard, number in the shard, from 0) of a sample. This reads nothing."""
        shard, row = self.locate(number)
        return self.url(shard), row

    def url(self, shard: int) -> str:
        """The URL of a shard, by its number in the whole set."""
        spec = int(self._spec_of[shard])
        indexed = self.manifests[spec]
        return indexed.manifest.url(int(indexed.rows[shard - self._spec_first[spec]]))

    def pieces(self, number: int, count: int) -> list[Piece]:
        """The samples [number, number + count) as pieces, one for each shard."""
        out = []
        while count > 0:
            shard, row = self.locate(number)
            take = min(count, int(self.first[shard + 1]) - number)
            spec = int(self._spec_of[shard])
            indexed = self.manifests[spec]
            stored = indexed.records(int(indexed.rows[shard - self._spec_first[spec]]), row, take)
            if indexed.manifest.extensions == self.extensions:
                records = stored
            else:  # columns of the manifest -> columns of the dataset
                records = np.zeros((take, len(self.extensions)), RECORD)
                for column, extension in enumerate(indexed.manifest.extensions):
                    records[:, self.extensions.index(extension)] = stored[:, column]
            out.append(Piece(number, self.url(shard), records))
            number, count = number + take, count - take
        return out

    def name(self, number: int) -> tuple[str, str]:
        """(shard, key) of a sample, read from the headers of the tar between the previous sample and this one."""
        _, row = self.locate(number)
        previous = min(row, 1)  # samples before this one in the piece: 1, or 0 for the first sample of a shard
        (piece,) = self.pieces(number - previous, 1 + previous)
        begin = 0
        if previous:
            records = piece.records[0]
            ends = (records["offset"] + records["size"])[records["offset"] > 0]
            begin = int(ends.max() + 511) // 512 * 512  # a tar consists of blocks of 512 bytes
        offsets = piece.records[-1]["offset"]
        try:
            headers = self.reader.range(piece.url, begin, int(offsets[offsets > 0].min()))
            return piece.url, _last_key(headers) or f"sample {row}"
        except DataError:
            return piece.url, f"sample {row}"

    def hashes(self, extensions: Sequence[str]) -> np.ndarray:
        """uint64 [N]: for each sample the hash of its first member among `extensions`, or 0 if it has none.

        Equal members have equal hashes.
        """
        out = np.zeros(len(self), np.uint64)
        for piece in self.pieces(0, len(self)):
            of_piece = out[piece.first : piece.first + len(piece.records)]  # a view of `out`
            for column in reversed(self.columns(extensions)):
                present = piece.records[:, column]["offset"] > 0
                of_piece[present] = piece.records[present, column]["hash"]
        return out

    def read(self, number: int, extensions: Iterable[str] | None = None) -> dict[str, bytes]:
        """{extension: bytes} of a sample's members, or of those with the given extensions, each checked.

        Raises `Damaged` if they differ from the index.
        """
        extensions = self.extensions if extensions is None else extensions
        return {self.extensions[c]: data for c, data in self.read_columns(number, self.columns(extensions)).items()}

    def read_columns(self, number: int, columns: list[int]) -> dict[int, bytes]:
        """As `read`, but {column of the index: bytes}."""
        (piece,) = self.pieces(number, 1)
        rows = piece.records[0].tolist()  # (offset, size, hash) of each column; plain numbers are quicker than numpy's
        present = {c: rows[c] for c in columns if rows[c][0]}
        begin = min((offset for offset, _, _ in present.values()), default=0)
        end = max((offset + size for offset, size, _ in present.values()), default=0)
        for second_read in (False, True):  # an error in transit disappears in the second read, a damaged file does not
            data = self.reader.range(piece.url, begin, end)
            try:
                return {
                    c: verified(data[offset - begin : offset - begin + size], size, digest)
                    for c, (offset, size, digest) in present.items()
                }
            except Damaged:
                if second_read:
                    raise
        raise AssertionError

    def has(self, number: int, extension: str) -> bool:
        """Whether the sample has a member of this extension, by the index."""
        (piece,) = self.pieces(number, 1)
        return any(piece.records[0, column]["offset"] > 0 for column in self.columns([extension]))

    def columns(self, extensions: Iterable[str]) -> list[int]:
        """The columns of these extensions in the records, without unknown ones."""
        wanted = set(extensions)
        return [c for c, e in enumerate(self.extensions) if e in wanted]

    def ranges(self, piece: Piece, columns: list[int]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """(offset of the first byte, (byte range,)) of the members of a piece in the given columns."""
        begin, end = span(piece.records, columns)
        return begin, ((begin, end),)

    def checked(self, number: int, members: dict[int, Any]) -> dict[int, Any]:
        """The same members, because the client of the prefetch server has verified every hash of the index."""
        return members

    def sample(self, number: int, members: dict[int, Any], parts: Mapping[str, Part]) -> dict[str, Any]:
        """The sample that the views get: the value of each part, by the part's name. Raises `Damaged`."""
        by_extension: dict[str, bytes] = {self.extensions[c]: data for c, data in members.items()}
        known, out = self.known(number), {}
        for name, part in parts.items():
            part_members = {e: by_extension[e] for e in part.extensions if e in by_extension}
            if not part_members:
                raise part.absent()
            out[name] = part.decode(part_members, known)
        return out

    def known(self, number: int) -> dict[str, Any]:
        """What the manifest states about all of its samples: {"pixels": options for decoding, "classes": the names of
        the classes}."""
        manifest = self._manifest(number)
        return {"pixels": manifest.pixels, "classes": manifest.classes}

    def encoded(
        self, number: int, data: bytes, extension: str, channels: int = 3, dtype: PixelDtype = "uint8"
    ) -> Encoded:
        """An image of a sample, with the options for decoding that its manifest gives."""
        known = self._manifest(number).pixels
        return Encoded(data, extension, channels, **known, max_pixels=self.max_pixels, dtype=dtype)

    def _manifest(self, number: int) -> Manifest:
        return self.manifests[int(self._spec_of[self.locate(number)[0]])].manifest

    def image(
        self,
        number: int,
        channels: int = 3,
        take: Callable[[int], None] | None = None,
        dtype: PixelDtype = "uint8",
    ) -> np.ndarray:
        """The image of a sample, `dtype` [H, W, channels]. Raises `Damaged`. `take`: `reserve` of `Encoded`."""
        for extension, data in self.read(number, IMAGE_MEMBERS).items():
            encoded = self.encoded(number, data, extension, channels, dtype)
            encoded.reserve = take
            return encoded.pixels()
        raise Absent(f"holds no image member ({', '.join(IMAGE_MEMBERS)})")

    def stored_dtype(self) -> PixelDtype:
        """The smallest dtype that keeps all bits of the first image that can be read; uint8 if none of the first MAX_TRIED
        can."""
        if not {ARRAY, "png", "tif", "tiff"} & {*self.extensions}:
            return "uint8"
        for number in range(min(len(self), MAX_TRIED)):
            with contextlib.suppress(Damaged):
                for extension, data in self.read(number, IMAGE_MEMBERS).items():
                    return self.encoded(number, data, extension).stored_dtype
        return "uint8"

    def label(self, number: int) -> str:
        """The label of a sample: the name of its class if the manifest has names, otherwise the text of its `cls`
        member.
        """
        data = self.read(number, ("cls",)).get("cls")
        if data is None:
            shard, key = self.name(number)
            folders = "; `unlabeled shards build` makes labels of the folders in tars" if "/" in key else ""
            raise DataError(f"{shard}: {key} has no .cls member, so it has no label to score with{folders}")
        names = self._manifest(number).classes
        text = data.decode(errors="replace").strip()
        return names[int(text)] if names and is_number(text) and int(text) < len(names) else text


# ---------------------------------------------------------------- bytes
def span(records: np.ndarray, columns: list[int]) -> tuple[int, int]:
    """The byte range [begin, end) from the first to the last member in the given columns of `records` [n, extensions]
    of one shard; (0, 0) if there is none."""
    wanted = records[:, columns]  # [n, len(columns)]
    offsets, sizes = wanted["offset"].astype(np.int64), wanted["size"].astype(np.int64)
    present = offsets > 0
    if not present.any():
        return 0, 0
    return int(offsets[present].min()), int((offsets + sizes)[present].max())


def verified(data: bytes, size: int, digest: int) -> bytes:
    """`data` itself. Raises `Damaged` if its length or its hash differs from the index."""
    if len(data) != size:
        raise Damaged(f"{len(data)} of {size} bytes could be read")
    found = xxhash.xxh3_64_intdigest(data)
    if found != digest:
        raise Damaged(f"the bytes are not those that were indexed: their hash is {found:016x}, not {digest:016x}")
    return data


def _last_key(header: bytes) -> str | None:
    """The key of the member to which the last header in these bytes belongs; None if there is no header."""
    key = None
    try:
        with open_tar(io.BytesIO(header)) as tar:
            for member in tar_members(tar):
                match = MEMBER_NAME.match(member.name)
                key = match[1] if match else key
    except tarfile.TarError:
        pass  # the bytes end before the data of the last member
    return key
