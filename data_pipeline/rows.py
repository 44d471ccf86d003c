"""Rows of tokens as a dataset: T is chosen when they are read, row i is found by arithmetic, and a row's bytes are checked without its whole block.

Row r of a block of P targets is, with `split`, its tokens rT .. rT + T, both included: each token but a shard's first is a target exactly once. With
`best_fit` a window of ROWS rows' tokens is laid out anew (packing.py); it is read whole, and nothing but the last windows' layouts is kept in
memory. Either way a block has ceil(P / T) rows, of which the last may be padded.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash

from data_pipeline import tokens as blocks
from data_pipeline.decode import Damaged
from data_pipeline.fetch import Fetcher
from data_pipeline.index import RECORD, Manifest
from data_pipeline.packing import ROWS, Part, best_fit
from data_pipeline.shards import Piece
from data_pipeline.storage import DataError
from data_pipeline.tokens import PAGE, Blocks, Docs
from data_pipeline.vocabulary import Vocabulary

Packing = Literal["split", "best_fit"]
IGNORED = -100  # a target that counts for nothing
KEPT = 1024  # .docs members, and layouts of windows, that are kept: some kilobytes each


def next_tokens(tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """What follows each of the first T of a row's T + 1 tokens, [T]; IGNORED where that is of another document, or padding."""
    known = (documents[1:] == documents[:-1]) & (documents[1:] >= 0)
    return np.where(known, tokens[1:], IGNORED)


class Window(NamedTuple):
    """What one row is made of: tokens first..last (both included) of a block, which lie in whole pages from `begin` on."""

    block: int  # among all of the set
    shard: int
    first: int
    last: int
    row: int  # inside the window
    begin: int  # the first token of the first page
    end: int  # behind the last token of the last page


class Rows:
    """Rows of T + 1 tokens: what `Samples` is to a stream, of token sets."""

    extensions = [blocks.DOCS, blocks.TOKENS]

    def __init__(
        self,
        specs: Iterable[str],
        length: int,
        packing: Packing = "split",
        document_mask: bool = True,
        fetcher: Fetcher | None = None,
    ):
        held = self.blocks = Blocks(specs, fetcher)
        self.specs, self.names, self.manifests, self.fetcher = held.specs, held.names, held.manifests, held.fetcher
        self.length, self.packing, self.document_mask = length, packing, document_mask
        if length < 1 or length > held.block.min():
            raise DataError(
                f"data.length = {length}: must be 1 or more, and at most the {held.block.min()} tokens of a block of {self.names};"
                " `unlabeled shards tokenize --block` makes longer ones"
            )
        per_block = -(-held.block // length)
        rest = held.tokens - 1 - (np.diff(held.first) - 1) * held.block  # targets of each shard's last block
        self.first = np.concatenate([[0], np.cumsum((np.diff(held.first) - 1) * per_block - (-rest // length))])
        self.pad, self._begins = held.pad, self.first.tolist()  # plain numbers are quicker than numpy's
        sizes = (held.first[:-1], held.block, held.tokens, per_block)
        self._sizes = list(zip(*(column.tolist() for column in sizes), strict=True))
        self._docs = functools.lru_cache(KEPT)(self._read_docs)
        self._layout = functools.lru_cache(KEPT)(self._lay_out)

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def vocabulary(self) -> Vocabulary:
        return self.blocks.vocabulary

    @functools.cached_property
    def id(self) -> str:
        """A hash of every byte and of how rows are cut from them."""
        return xxhash.xxh3_128_hexdigest(f"{self.blocks.id} {self.length} {self.packing}".encode())

    @property
    def total_bytes(self) -> int:
        return self.blocks.total_bytes

    @property
    def about(self) -> dict[str, Any]:
        """What opens the same rows in another process."""
        return {"specs": self.specs, "length": self.length, "packing": self.packing}

    def merged(self) -> Manifest:
        out = self.blocks.merged()
        out.id = self.id
        return out

    def url(self, shard: int) -> str:
        return self.blocks.url(shard)

    def columns(self, extensions: Iterable[str]) -> list[int]:
        """Both members, whatever is asked for."""
        return [0, 1]

    # -- where rows are
    def window(self, number: int) -> Window:
        """Where the tokens of a row are."""
        shard = bisect.bisect_right(self._begins, number) - 1
        first_block, block, tokens, per_block = self._sizes[shard]
        inside, row = divmod(number - self._begins[shard], per_block)
        targets, span = min(block, tokens - 1 - inside * block), self.length
        if self.packing == "best_fit":
            span *= ROWS
            first = row // ROWS * span
        else:
            first = row * span
        last = min(first + span, targets)
        begin, end = first // PAGE * PAGE, min((last // PAGE + 1) * PAGE, targets + 1)
        return Window(first_block + inside, shard, first, last, row, begin, end)

    def pieces(self, number: int, count: int) -> list[Piece]:
        """The rows [number, number + count) by block. Their records count from 1 in what `ranges` gives, .docs first; .tokens has no hash: `checked`."""
        out = []
        while count > 0:
            windows = [self.window(number)]
            while len(windows) < count and (w := self.window(number + len(windows))).block == windows[0].block:
                windows.append(w)
            width = int(self.blocks.width[windows[0].shard])
            url, docs, tokens = self.blocks.members(windows[0].block)
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
        """(what the first byte counts as, byte ranges) of a piece."""
        return 1, piece.ranges

    def name(self, number: int) -> tuple[str, str]:
        """(shard, block and row) of a row."""
        shard, key = self.blocks.name(self.window(number).block)
        return shard, f"{key} row {self.window(number).row}"

    # -- reading
    def read_columns(self, number: int, columns: list[int]) -> dict[int, Any]:
        """{0: .docs, 1: the pages of the row} from where they are, checked. Raises `Damaged`."""
        w = self.window(number)
        url, docs_record, (offset, _, _) = self.blocks.members(w.block)
        width = int(self.blocks.width[w.shard])
        for last in (False, True):
            try:
                docs = self._docs(url, docs_record)
                data = self.fetcher.range(url, offset + w.begin * width, offset + w.end * width)
                self._check(w, data, docs)
                return {0: docs, 1: data}
            except Damaged:  # of the way, or of the file: a second look tells
                if last:
                    raise
        raise AssertionError

    def _read_docs(self, url: str, record: tuple[int, int, int]) -> Docs:
        return blocks.parse_docs(blocks.fetch_docs(self.fetcher, url, record))

    def _check(self, w: Window, data: bytes, docs: Docs) -> None:
        width = int(self.blocks.width[w.shard])
        if len(data) != (w.end - w.begin) * width:
            raise Damaged(f"{len(data)} of {(w.end - w.begin) * width} bytes could be read")
        first = w.begin // PAGE
        pages: Iterable[int] = range(first, -(-w.end // PAGE))
        if self.packing == "best_fit":
            pages = sorted(
                {n for at, size in self._parts(w, docs) for n in range(at // PAGE, (at + size - 1) // PAGE + 1)}
            )
        blocks.check_pages(data, first, pages, docs, width)

    def checked(self, number: int, members: dict[int, Any]) -> dict[int, Any]:
        """Members that came from the feeder, whose .docs was checked on the way."""
        if all(isinstance(member, bytes) for member in members.values()):
            try:
                docs = blocks.parse_docs(members[0])
                self._check(self.window(number), members[1], docs)
                return {0: docs, 1: members[1]}
            except Damaged as reason:
                return {-1: reason}
        return members

    def sample(self, number: int, members: dict[int, Any], look: Any) -> dict[str, Any]:
        """{"tokens": int64 [T + 1], "documents": int32 [T + 1]}: documents are counted from 0 in each row, padding is −1."""
        w, docs = self.window(number), members[0]
        data = np.frombuffer(members[1], blocks.dtype(self.blocks.width[w.shard]))
        if self.packing == "best_fit":
            return self._packed(self._parts(w, docs), data, w.begin)
        size = w.last - w.first + 1
        out = np.empty(self.length + 1, np.int64)
        out[:size] = data[w.first - w.begin : w.last + 1 - w.begin]
        documents = np.zeros(self.length + 1, np.int32)
        if self.document_mask:
            documents[_starts(w, docs) - w.first] = 1
            np.cumsum(documents, out=documents)
        out[size:], documents[size:] = self.pad, -1
        return {"tokens": out, "documents": documents}

    def _parts(self, w: Window, docs: Docs) -> list[Part]:
        """The pieces of documents that a row of `best_fit` is made of."""
        return self._layout(w.first, w.last, _starts(w, docs).tobytes())[w.row % ROWS]

    def _lay_out(self, first: int, last: int, starts: bytes) -> list[list[Part]]:
        return best_fit(first, last, np.frombuffer(starts, "<u4"), self.length)

    def _packed(self, parts: list[Part], data: np.ndarray, begin: int) -> dict[str, Any]:
        out = np.full(self.length + 1, self.pad, np.int64)
        documents = np.full(self.length + 1, -1, np.int32)
        at = 0
        for n, (start, size) in enumerate(parts):
            out[at : at + size] = data[start - begin : start - begin + size]
            documents[at : at + size] = n if self.document_mask else 0
            at += size
        return {"tokens": out, "documents": documents}


def _starts(w: Window, docs: Docs) -> np.ndarray:
    """Where documents begin in a window, but for its first token."""
    low, high = docs.starts.searchsorted(np.array([w.first, w.last], np.uint32), "right")
    return docs.starts[low:high]
