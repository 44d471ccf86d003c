"""Token sets: what `unlabeled shards tokenize` writes, and how blocks and documents are read from it.

A shard is a WebDataset tar. Its documents, each with the tokenizer's BOS before and EOS after it (whichever it has), follow each other in one long row of
N tokens, which is cut into blocks of P targets: block b holds the tokens bP .. bP + P, both included, so that each of its tokens but the first
can be predicted from the block alone. A sample of the tar is a block, of two members:

    NAME.docs    u32: 1 (format), n documents, m pages, 0; u32 [n] the token inside the block at which each document begins; u32 [n] the bytes of
                 UTF-8 of each document's text; u64 [m] xxh3-64 of each page of PAGE tokens; all little-endian
    NAME.tokens  u16 (up to 65,536 tokens) or u32, little-endian, flat

The hashes of pages let a row be read and checked without its block. The manifest has, under "tokens", the type, P, the tokens of each shard, and
the tokenizer's hash; tokenizer.json lies beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xxhash

from data_pipeline.decode import Damaged
from data_pipeline.fetch import Fetcher
from data_pipeline.index import Manifest
from data_pipeline.shards import Samples, check
from data_pipeline.storage import DataError
from data_pipeline.vocabulary import Vocabulary

FORMAT = 1
PAGE = 1024  # tokens: what one damaged byte costs
BLOCK = 1 << 18  # targets of a block, unless `shards tokenize --block` says otherwise
DOCS, TOKENS = "docs", "tokens"  # extensions


class Docs(NamedTuple):
    """The documents that begin in a block, [n] each, and its pages' hashes [m]."""

    starts: np.ndarray
    bytes: np.ndarray
    pages: np.ndarray


def pack_docs(starts: Iterable[int], sizes: Iterable[int], tokens: bytes, width: int) -> bytes:
    """The .docs member of a block whose .tokens member is `tokens`, of `width` bytes a token."""
    step = PAGE * width
    pages = [xxhash.xxh3_64_intdigest(tokens[at : at + step]) for at in range(0, len(tokens), step)]
    starts, sizes = np.array([*starts], "<u4"), np.array([*sizes], "<u4")
    head = np.array([FORMAT, len(starts), len(pages), 0], "<u4")
    return b"".join(part.tobytes() for part in (head, starts, sizes, np.array(pages, "<u8")))


def parse_docs(data: bytes) -> Docs:
    """What `pack_docs` has written. Raises `Damaged`."""
    head = np.frombuffer(data[:16], "<u4")
    if len(head) < 4 or head[0] != FORMAT or len(data) != 16 + 8 * int(head[1]) + 8 * int(head[2]):
        raise Damaged(".docs is not what this version reads")
    n = int(head[1])
    both = np.frombuffer(data, "<u4", 2 * n, 16)
    return Docs(both[:n], both[n:], np.frombuffer(data, "<u8", int(head[2]), 16 + 8 * n))


def check_pages(data: bytes, first: int, pages: Iterable[int], docs: Docs, width: int) -> None:
    """Raises `Damaged` where some pages of a block are not what was hashed; `data` begins with page `first`."""
    step = PAGE * width
    view = memoryview(data)
    for n in pages:
        at = (n - first) * step
        found, expected = (
            xxhash.xxh3_64_intdigest(view[at : at + step]),
            int(docs.pages[n]) if n < len(docs.pages) else 0,
        )
        if found != expected:
            raise Damaged(
                f"the tokens from {n * PAGE} on are not those that were written: their hash is {found:016x}, not {expected:016x}"
            )


class Blocks(Samples):
    """The blocks of token sets, as samples; their sizes in tokens follow from the manifest."""

    def __init__(self, specs: Iterable[str], fetcher: Fetcher | None = None):
        super().__init__(specs, fetcher)
        abouts = [_about(part.manifest, self.names) for part in self.manifests]
        _check_tokenizers(abouts, self.specs)
        self.hash, self.pad = abouts[0]["tokenizer"], abouts[0]["pad"]
        rows = [(about, part, row) for about, part in zip(abouts, self.manifests, strict=True) for row in part.rows]
        counts = [int(part.manifest.counts[row]) for _, part, row in rows]
        self.width = np.array([np.dtype(about["dtype"]).itemsize for about, _, _ in rows])  # bytes a token [shards]
        self.block = np.array([about["block"] for about, _, _ in rows], np.int64)
        self.tokens = np.array([_tokens(about, part.manifest, row) for about, part, row in rows], np.int64)
        if ((self.tokens - 2) // self.block + 1 != counts).any():
            raise DataError(f"{self.names}: the manifest's tokens and blocks do not fit; tokenize the text again")
        self._columns = self.extensions.index(DOCS), self.extensions.index(TOKENS)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer.json in the first folder."""
        held = Vocabulary.read(self.url(0).rpartition("/")[0] or ".")
        if held.hash != self.hash:
            raise DataError(
                f"{held.source}: is not the tokenizer that the tokens beside it were made with; put that one back"
            )
        return held

    def members(self, number: int) -> tuple[str, tuple[int, int, int], tuple[int, int, int]]:
        """(url, (offset, bytes, hash) of .docs, and of .tokens) of a block."""
        (piece,) = self.pieces(number, 1)
        row = piece.records[0].tolist()
        return piece.url, row[self._columns[0]], row[self._columns[1]]

    def load(self, number: int) -> tuple[np.ndarray, Docs]:
        """(all tokens, documents) of a block, checked. Raises `Damaged`."""
        data = self.read(number, (DOCS, TOKENS))
        if len(data) < 2:
            raise Damaged("lacks a member")
        return np.frombuffer(data[TOKENS], dtype(self.width[self.locate(number)[0]])), parse_docs(data[DOCS])

    def text_bytes(self) -> int:
        """Bytes of UTF-8 of the text of all documents. Raises `Damaged`."""
        total = 0
        for number in range(len(self)):
            url, record, _ = self.members(number)
            docs = parse_docs(fetch_docs(self.fetcher, url, record))
            shard, last = self.locate(number)[0], number + 1 in self.first
            own = (
                slice(None) if last else docs.starts < self.block[shard]
            )  # what begins at the last token begins the next block
            total += int(docs.bytes[own].sum())
        return total

    def documents(self, first: int = 0, last: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """(tokens with BOS and EOS, bytes of its text) of every document, in order, of shards [first, last). Raises `Damaged`."""
        for shard in range(first, len(self.first) - 1 if last is None else last):
            count = int(self.first[shard + 1] - self.first[shard])
            held: list[np.ndarray] = []
            size = 0
            for inside in range(count):
                tokens, docs = self.load(int(self.first[shard]) + inside)
                tokens = tokens if inside == count - 1 else tokens[:-1]  # the next block has that one, too
                bounds = [*docs.starts[docs.starts < len(tokens)].tolist(), len(tokens)]
                held.append(tokens[: bounds[0]])
                for begin, end, following in zip(bounds, bounds[1:], docs.bytes.tolist(), strict=False):
                    if any(map(len, held)):
                        yield np.concatenate(held), size
                    held, size = [tokens[begin:end]], following
            yield np.concatenate(held), size


def dtype(width: int) -> np.dtype:
    """Of tokens of so many bytes."""
    return np.dtype("<u2" if width == 2 else "<u4")


def fetch_docs(fetcher: Fetcher, url: str, record: tuple[int, int, int]) -> bytes:
    """The .docs member of a block, checked. Raises `Damaged`."""
    offset, size, digest = record
    return check(fetcher.range(url, offset, offset + size), size, digest)


def holds_tokens(manifest: Manifest) -> bool:
    return "tokens" in manifest.about


def _about(manifest: Manifest, names: str) -> dict[str, Any]:
    about = manifest.about.get("tokens")
    if about is None:
        raise DataError(
            f"{names}: holds {', '.join('.' + e for e in manifest.extensions)} and no tokens;"
            " make them with `unlabeled shards tokenize TEXT_SHARDS TARGET` and name that folder"
        )
    if about["format"] != FORMAT:
        raise DataError(
            f"{names}: has tokens of format {about['format']}, but this version reads {FORMAT}; tokenize again"
        )
    return about


def _tokens(about: dict[str, Any], manifest: Manifest, row: int) -> int:
    name = manifest.names[row].rpartition("/")[2]
    if name not in about["shards"]:
        raise DataError(
            f"{manifest.url(row)}: the manifest does not say how many tokens it has; tokenize the text again"
        )
    return about["shards"][name]


def _check_tokenizers(abouts: list[dict[str, Any]], specs: list[str]) -> None:
    if len({about["tokenizer"] for about in abouts}) > 1:
        raise DataError(
            f"{', '.join(specs)}: were made with different tokenizers; tokenize them with the same one (--tokenizer FILE)"
        )
