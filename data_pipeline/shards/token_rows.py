"""Rows of T + 1 tokens as a dataset. T is chosen when the rows are read; the position of row i is computed, and its
bytes are verified without reading the whole block.

With packing `split`, row r of a block of P targets is the tokens rT .. rT + T of the block, both included; each token
except the first of a shard is a target exactly once. With `best_fit`, the documents in the tokens of WINDOW_ROWS rows
are packed into as many rows (packing.py); the whole window is read to make one row, and only the layouts of the last
windows are kept in memory. With both packings a block has ceil(P / T) rows, of which the last may be padded.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from common.errors import Damaged, DataError
from data_pipeline.shards import token_blocks as blocks
from data_pipeline.shards.dataset import Piece
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.packing import WINDOW_ROWS, Part, best_fit
from data_pipeline.shards.tar_scan import RECORD
from data_pipeline.shards.token_blocks import PAGE, Blocks, Docs
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.storage.ranges import RangeReader

Packing = Literal["split", "best_fit"]
IGNORED = -100  # a target that the loss ignores
MAX_CACHED_DOCS = 1024  # .docs members, their records and layouts of windows in memory: some kilobytes each


def next_tokens(tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The token after each of the first T tokens of a row, [T]; IGNORED where that token belongs to another document or
    is padding. `tokens`, `documents`: [T + 1].
    """
    known = (documents[1:] == documents[:-1]) & (documents[1:] >= 0)
    return np.where(known, tokens[1:], IGNORED)


def targets_of(sample: dict[str, Any]) -> np.ndarray:
    """The targets of a causal model at the first T tokens of a row, [T]; IGNORED where there is none."""
    if "next" in sample:
        return sample["next"]
    return next_tokens(sample["tokens"], sample["documents"])


class Window(NamedTuple):
    """The tokens that are read to make one row: first..last (both included) of a block, and the whole pages around
    them.
    """

    block: int  # number of the block in the whole set
    shard: int
    first: int
    last: int
    row: int  # number of the row in its block
    begin: int  # first token of the first page
    end: int  # one more than the last token of the last page


class Rows:
    """The dataset of rows of T + 1 tokens of token sets; `length` is T."""

    extensions = [blocks.DOCS, blocks.TOKENS]
    unit = "rows"

    def __init__(
        self,
        specs: Iterable[str],
        length: int,
        packing: Packing = "split",
        document_mask: bool = True,
        reader: RangeReader | None = None,
    ):
        token_set = self.blocks = Blocks(specs, reader)
        self.specs, self.names, self.manifests = token_set.specs, token_set.names, token_set.manifests
        self.reader, self.pad = token_set.reader, token_set.pad
        self.length = length
        self.packing, self.document_mask = packing, document_mask
        if length < 1 or length > token_set.block.min():
            raise DataError(
                f"data.length = {length}: must be 1 or more, and at most the {token_set.block.min()} tokens of a block"
                f" of {self.names}; `unlabeled shards tokenize --block` makes longer blocks"
            )
        rows_per_block = -(-token_set.block // length)  # [shards], as the arrays below
        full_blocks = np.diff(token_set.first) - 1
        last_targets = token_set.tokens - 1 - full_blocks * token_set.block  # targets of the last block
        last_rows = -(-last_targets // length)
        self.first = np.concatenate([[0], np.cumsum(full_blocks * rows_per_block + last_rows)])
        # Lists of plain integers are faster to read than arrays.
        self._first_rows = self.first.tolist()
        columns = (token_set.first[:-1], token_set.block, token_set.tokens, rows_per_block)
        self._shards = list(zip(*(column.tolist() for column in columns), strict=True))
        self._create_caches()

    def _create_caches(self) -> None:
        self._members = functools.lru_cache(MAX_CACHED_DOCS)(self.blocks.members)
        self._docs = functools.lru_cache(MAX_CACHED_DOCS)(self._read_docs)
        self._layout = functools.lru_cache(MAX_CACHED_DOCS)(self._pack_window)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_members", "_docs", "_layout")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._create_caches()

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def vocabulary(self) -> Vocabulary:
        return self.blocks.vocabulary

    @functools.cached_property
    def id(self) -> str:
        """A hash of every byte of the shards and of the options that determine the rows."""
        return xxhash.xxh3_128_hexdigest(f"{self.blocks.id} {self.length} {self.packing}".encode())

    @property
    def total_bytes(self) -> int:
        return self.blocks.total_bytes

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which another process opens the same rows."""
        return {"specs": self.specs, "length": self.length, "packing": self.packing}

    def merged(self) -> Manifest:
        """One manifest of all specs, with the numbers of tokens, documents and bytes of text."""
        out = self.blocks.merged()
        out.id = self.id
        entries = [part.manifest.details["tokens"] for part in self.manifests]
        text: dict[str, Any] = {"tokens": int(self.blocks.tokens.sum())}
        if all(len(part.rows) == len(part.manifest.names) for part in self.manifests):  # all shards of each set
            text |= {key: sum(entry[key] for entry in entries) for key in ("documents", "bytes")}
        out.details["text"] = text
        return out

    def url(self, shard: int) -> str:
        return self.blocks.url(shard)

    def columns(self, extensions: Iterable[str]) -> list[int]:
        """The columns of .docs and .tokens: a row always needs both."""
        return [0, 1]

    # -- positions of rows
    def window(self, number: int) -> Window:
        """The tokens that are read to make a row."""
        shard = bisect.bisect_right(self._first_rows, number) - 1
        first_block, block_targets, shard_tokens, rows_per_block = self._shards[shard]
        block, row = divmod(number - self._first_rows[shard], rows_per_block)  # of the shard, of the block
        targets = min(block_targets, shard_tokens - 1 - block * block_targets)  # of this block
        window_rows = WINDOW_ROWS if self.packing == "best_fit" else 1
        first = row // window_rows * window_rows * self.length
        last = min(first + window_rows * self.length, targets)
        begin, end = first // PAGE * PAGE, min((last // PAGE + 1) * PAGE, targets + 1)
        return Window(first_block + block, shard, first, last, row, begin, end)

    def pieces(self, number: int, count: int) -> list[Piece]:
        """The rows [number, number + count) as pieces, one for each block.

        The offsets in the records count from 1 in the concatenation of the piece's `ranges` (.docs, then .tokens). The
        records of .tokens hold no hash: `checked` verifies the pages.
        """
        out = []
        while count > 0:
            windows = [self.window(number)]
            for following in range(number + 1, number + count):
                window = self.window(following)
                if window.block != windows[0].block:
                    break
                windows.append(window)
            width = int(self.blocks.width[windows[0].shard])
            url, docs, tokens = self._members(windows[0].block)
            low, high = min(w.begin for w in windows) * width, max(w.end for w in windows) * width
            records = np.zeros((len(windows), 2), RECORD)
            records[:, 0] = (1, docs[1], docs[2])
            for record, w in zip(records, windows, strict=True):
                record[1] = (1 + docs[1] + w.begin * width - low, (w.end - w.begin) * width, 0)
            ranges = ((docs[0], docs[0] + docs[1]), (tokens[0] + low, tokens[0] + high))
            out.append(Piece(number, url, records, ranges))
            number, count = number + len(windows), count - len(windows)
        return out

    def ranges(self, piece: Piece, columns: list[int]) -> tuple[int, tuple[tuple[int, int], ...]]:
        """(offset that the records give to the first byte, byte ranges) of a piece. The offset is always 1."""
        return 1, piece.ranges

    def name(self, number: int) -> tuple[str, str]:
        """(shard, "BLOCK row N") of a row."""
        shard, key = self.blocks.name(self.window(number).block)
        return shard, f"{key} row {self.window(number).row}"

    def location(self, number: int) -> tuple[str, int]:
        """(URL of the shard, number in the shard, from 0) of a row. This reads nothing."""
        shard = self.window(number).shard
        return self.url(shard), number - self._first_rows[shard]

    # -- reading
    def read_columns(self, number: int, columns: list[int]) -> dict[int, Any]:
        """{0: the documents of the block, 1: the pages of the row}, read and verified. Raises `Damaged`."""
        w = self.window(number)
        url, docs_record, (offset, _, _) = self._members(w.block)
        width = int(self.blocks.width[w.shard])
        for second_read in (False, True):  # an error in transit disappears in the second read, a damaged file does not
            try:
                docs = self._docs(url, docs_record)
                data = self.reader.range(url, offset + w.begin * width, offset + w.end * width)
                self._check(w, data, docs)
                return {0: docs, 1: data}
            except Damaged:
                if second_read:
                    raise
        raise AssertionError

    def _read_docs(self, url: str, record: tuple[int, int, int]) -> Docs:
        return blocks.parse_docs(blocks.read_docs(self.reader, url, record))

    def _check(self, w: Window, data: bytes, docs: Docs) -> None:
        """Verify the pages `data` of a window, or, for `best_fit`, those that the row needs. Raises `Damaged`."""
        width = int(self.blocks.width[w.shard])
        if len(data) != (w.end - w.begin) * width:
            raise Damaged(f"{len(data)} of {(w.end - w.begin) * width} bytes could be read")
        first = w.begin // PAGE
        pages: Iterable[int] = range(first, -(-w.end // PAGE))
        if self.packing == "best_fit":
            # If documents share a token, the last target of a part is the token after it.
            extra = int(self.blocks.joined[w.shard])
            needed = set[int]()
            for start, size in self._parts(w, docs):
                needed.update(range(start // PAGE, (start + size - 1 + extra) // PAGE + 1))
            pages = sorted(needed)
        blocks.check_pages(data, first, pages, docs, width)

    def checked(self, number: int, members: dict[int, Any]) -> dict[int, Any]:
        """Members from the prefetch server, after verifying the pages; its client has verified .docs."""
        if all(isinstance(member, bytes) for member in members.values()):
            try:
                docs = blocks.parse_docs(members[0])
                self._check(self.window(number), members[1], docs)
                return {0: docs, 1: members[1]}
            except Damaged as reason:
                return {-1: reason}
        return members

    def sample(self, number: int, members: dict[int, Any], parts: Any) -> dict[str, Any]:
        """{"tokens": int64 [T + 1], "documents": int32 [T + 1]}. Documents are counted from 0 in each row; padding has
        −1.

        If documents share the token between them (`joined`), also "next", int64 [T]: the next token of the same
        document for each token.
        """
        w, docs = self.window(number), members[0]
        data = np.frombuffer(members[1], blocks.dtype(self.blocks.width[w.shard]))
        if self.packing == "best_fit":
            return self._packed_row(self._parts(w, docs), data, w.begin, self.blocks.joined[w.shard])
        size = w.last - w.first + 1
        out = np.empty(self.length + 1, np.int64)
        out[:size] = data[w.first - w.begin : w.last + 1 - w.begin]
        documents = np.zeros(self.length + 1, np.int32)
        if self.document_mask:  # 1 at each token that begins a document; the sum numbers the documents
            documents[_starts(w, docs) - w.first] = 1
            np.cumsum(documents, out=documents)
        out[size:], documents[size:] = self.pad, -1
        sample = {"tokens": out, "documents": documents}
        if self.blocks.joined[w.shard]:
            sample["next"] = np.where(documents[1:] >= 0, out[1:], IGNORED)
        return sample

    def _parts(self, w: Window, docs: Docs) -> list[Part]:
        """The parts of documents in a row, for packing `best_fit`."""
        joined = self.blocks.joined[w.shard]
        return self._layout(w.first, w.last, _starts(w, docs).tobytes(), joined)[w.row % WINDOW_ROWS]

    def _pack_window(self, first: int, last: int, starts: bytes, joined: bool) -> list[list[Part]]:
        """The parts in each row of a window. `starts` is bytes, because arguments of a cached function are hashed."""
        return best_fit(first, last, np.frombuffer(starts, "<u4"), self.length, joined)

    def _packed_row(self, parts: list[Part], data: np.ndarray, begin: int, joined: bool) -> dict[str, Any]:
        """A row that consists of parts of documents. `data`: the tokens of the block from `begin` on.

        If documents share tokens, a part of n tokens has n targets, the last of which is the token after the part.
        """
        out = np.full(self.length + 1, self.pad, np.int64)
        documents = np.full(self.length + 1, -1, np.int32)
        following = np.full(self.length + 1, IGNORED, np.int64)
        filled = 0  # tokens of the row that are set
        for n, (start, size) in enumerate(parts):
            target, source = slice(filled, filled + size), start - begin
            out[target] = data[source : source + size]
            documents[target] = n if self.document_mask else 0
            if joined:
                following[target] = data[source + 1 : source + 1 + size]
            filled += size
        if joined and filled == self.length:
            out[filled], documents[filled] = following[filled - 1], documents[filled - 1]
        sample = {"tokens": out, "documents": documents}
        return sample | ({"next": following[:-1]} if joined else {})


def _starts(w: Window, docs: Docs) -> np.ndarray:
    """The tokens of a window, except its first one, at which documents begin."""
    low, high = docs.starts.searchsorted(np.array([w.first, w.last], np.uint32), "right")
    return docs.starts[low:high]
