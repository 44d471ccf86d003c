"""Token sets, which `unlabeled shards tokenize` writes: their format, and how blocks and documents are read from them.

A shard is a WebDataset tar. Its documents are concatenated into one sequence of N tokens; each document begins with the
tokenizer's BOS and ends with its EOS, if the tokenizer has these tokens. If BOS and EOS are the same token, format 1
has it twice between two documents. Format 2 (`joined`) has it once: as the EOS of one document and the BOS of the next.
The sequence is split into blocks of P targets: block b holds the P + 1 tokens bP to bP + P inclusive, so that two
consecutive blocks share one token, and each token of a block except the first can be predicted from the block alone. A
sample of the tar is a block, with two members:

    NAME.docs    little-endian: u32 1 (format of this member), u32 n documents, u32 m pages, u32 0;
                 u32 [n] the position in the block at which each document begins;
                 u32 [n] the number of UTF-8 bytes of the text of each document;
                 u64 [m] the xxh3-64 hash of each page of PAGE tokens
    NAME.tokens  u16 (for a vocabulary of up to 65,536 tokens) or u32, little-endian, flat

The hashes of the pages allow a reader to verify the pages of one training row without reading the whole block. The
manifest has an entry "tokens" with the dtype, P, the number of tokens of each shard, and the hash of the tokenizer;
the folder of the manifest also holds tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xxhash

from common.errors import Damaged, DataError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.samples import Samples, verified
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.storage.ranges import RangeReader

FORMAT = 1  # format of .docs members; also of sets with separate EOS and BOS tokens between two documents
JOINED = 2  # format of sets with a single token between two documents
PAGE = 1024  # tokens that share a hash; a damaged byte makes all of them unusable
BLOCK = 1 << 18  # default number of targets of a block (`shards tokenize --block`)
DOCS, TOKENS = "docs", "tokens"  # extensions of the two members


class Docs(NamedTuple):
    """The documents that begin in a block, and the hashes of its pages."""

    starts: np.ndarray  # uint32 [n], the position in the block at which each document begins
    bytes: np.ndarray  # uint32 [n], the number of UTF-8 bytes of the text of each document
    pages: np.ndarray  # uint64 [m], the xxh3-64 hash of each page


def pack_docs(starts: Iterable[int], sizes: Iterable[int], tokens: bytes, width: int) -> bytes:
    """The .docs member of a block whose .tokens member is `tokens`, with `width` bytes per token.

    `starts` and `sizes` become `Docs.starts` and `Docs.bytes`.
    """
    page_bytes = PAGE * width
    pages = [
        xxhash.xxh3_64_intdigest(tokens[offset : offset + page_bytes]) for offset in range(0, len(tokens), page_bytes)
    ]
    starts, sizes = np.array([*starts], "<u4"), np.array([*sizes], "<u4")
    head = np.array([FORMAT, len(starts), len(pages), 0], "<u4")
    return b"".join(part.tobytes() for part in (head, starts, sizes, np.array(pages, "<u8")))


def parse_docs(data: bytes) -> Docs:
    """Parse a .docs member. Raises `Damaged`."""
    head = np.frombuffer(data[:16], "<u4")
    if len(head) < 4 or head[0] != FORMAT or len(data) != 16 + 8 * int(head[1]) + 8 * int(head[2]):
        raise Damaged(".docs has no format that this version reads")
    n = int(head[1])
    starts_and_sizes = np.frombuffer(data, "<u4", 2 * n, 16)
    return Docs(starts_and_sizes[:n], starts_and_sizes[n:], np.frombuffer(data, "<u8", int(head[2]), 16 + 8 * n))


def check_pages(data: bytes, first: int, pages: Iterable[int], docs: Docs, width: int) -> None:
    """Compare the pages `pages` of a block with their hashes. Raises `Damaged` if one differs.

    `data` holds tokens of `width` bytes each, from the first token of page `first` on.
    """
    page_bytes = PAGE * width
    view = memoryview(data)
    for n in pages:
        offset = (n - first) * page_bytes
        found = xxhash.xxh3_64_intdigest(view[offset : offset + page_bytes])
        expected = int(docs.pages[n]) if n < len(docs.pages) else 0
        if found != expected:
            raise Damaged(
                f"the tokens from {n * PAGE} on are not those that were written: their hash is {found:016x}, not"
                f" {expected:016x}"
            )


class Blocks(Samples):
    """The blocks of token sets as samples. The number of tokens of each shard is known from the manifest, without
    reading the shard."""

    def __init__(self, specs: Iterable[str], reader: RangeReader | None = None):
        super().__init__(specs, reader)
        entries = [_entry(part.manifest, self.names) for part in self.manifests]
        _check_tokenizers(entries, self.specs)
        self.hash, self.pad = entries[0]["tokenizer"], entries[0]["pad"]
        self.lost = sum(entry.get("lost", 0) for entry in entries)  # number of characters that the tokenizer dropped
        rows = [(entry, part, row) for entry, part in zip(entries, self.manifests, strict=True) for row in part.rows]
        # [shards]: whether a single token separates two documents
        self.joined = [entry["format"] == JOINED for entry, _, _ in rows]
        counts = [int(part.manifest.counts[row]) for _, part, row in rows]
        self.width = np.array([np.dtype(entry["dtype"]).itemsize for entry, _, _ in rows])  # [shards], bytes per token
        # [shards]: the number of targets of a block (P), and the number of tokens of the shard (N)
        self.block = np.array([entry["block"] for entry, _, _ in rows], np.int64)
        self.tokens = np.array([_tokens(entry, part.manifest, row) for entry, part, row in rows], np.int64)
        if ((self.tokens - 2) // self.block + 1 != counts).any():
            raise DataError(
                f"{self.names}: the numbers of tokens and blocks in the manifest contradict each other; tokenize the"
                " text again"
            )
        self._columns = self.extensions.index(DOCS), self.extensions.index(TOKENS)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the tokenizer.json beside the first shard.

        Raises DataError if the tokens were made with another tokenizer.
        """
        vocabulary = Vocabulary.read(self.url(0).rpartition("/")[0] or ".")
        if vocabulary.hash != self.hash:
            raise DataError(
                f"{vocabulary.source}: is not the tokenizer that the tokens in its folder were made with; restore that"
                " one"
            )
        return vocabulary

    def members(self, number: int) -> tuple[str, tuple[int, int, int], tuple[int, int, int]]:
        """(URL of the shard, record of .docs, record of .tokens) of a block; a record is (offset, bytes, hash)."""
        (piece,) = self.pieces(number, 1)
        row = piece.records[0].tolist()
        return piece.url, row[self._columns[0]], row[self._columns[1]]

    def load(self, number: int) -> tuple[np.ndarray, Docs]:
        """(tokens, documents) of a whole block, verified against the hashes of its members. Raises `Damaged`."""
        data = self.read(number, (DOCS, TOKENS))
        if len(data) < 2:
            raise Damaged("lacks a member")
        return np.frombuffer(data[TOKENS], dtype(self.width[self.locate(number)[0]])), parse_docs(data[DOCS])

    def text_bytes(self) -> int:
        """The number of UTF-8 bytes of all documents together. Raises `Damaged`."""
        total = 0
        for number in range(len(self)):
            url, record, _ = self.members(number)
            docs = parse_docs(read_docs(self.reader, url, record))
            shard, last = self.locate(number)[0], number + 1 in self.first
            # The last token of a block is also the first of the next block, which counts a document that begins there.
            counted = slice(None) if last else docs.starts < self.block[shard]
            total += int(docs.bytes[counted].sum())
        return total

    def documents(self, first: int = 0, last: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """(tokens with BOS and EOS, bytes of the text) of every document in the shards first .. last - 1, in order.

        If `last` is None, all shards from `first` on are read. Raises `Damaged`.
        """
        for shard in range(first, len(self.first) - 1 if last is None else last):
            documents = self._documents(shard)
            if not self.joined[shard]:
                yield from documents
                continue
            tokens, size = next(documents)
            for next_tokens, next_size in documents:
                yield np.concatenate([tokens, next_tokens[:1]]), size  # the token that both documents share
                tokens, size = next_tokens, next_size
            yield tokens, size

    def _documents(self, shard: int) -> Iterator[tuple[np.ndarray, int]]:
        """As `documents`, for one shard, except that only the second of two documents has the token that they
        share."""
        count = int(self.first[shard + 1] - self.first[shard])
        parts: list[np.ndarray] = []  # the tokens of the current document, which may span several blocks
        size = 0  # bytes of the text of the current document
        for block in range(count):
            tokens, docs = self.load(int(self.first[shard]) + block)
            # The last token of a block is also the first of the next block.
            tokens = tokens if block == count - 1 else tokens[:-1]
            bounds = [*docs.starts[docs.starts < len(tokens)].tolist(), len(tokens)]
            parts.append(tokens[: bounds[0]])
            for begin, end, next_size in zip(bounds, bounds[1:], docs.bytes.tolist(), strict=False):
                if any(map(len, parts)):
                    yield np.concatenate(parts), size
                parts, size = [tokens[begin:end]], next_size
        yield np.concatenate(parts), size


def dtype(width: int) -> np.dtype:
    """The numpy dtype of tokens of `width` bytes, 2 or 4."""
    return np.dtype("<u2" if width == 2 else "<u4")


def read_docs(reader: RangeReader, url: str, record: tuple[int, int, int]) -> bytes:
    """The .docs member of a block, read at `record` = (offset, bytes, hash) and verified. Raises `Damaged`."""
    offset, size, digest = record
    return verified(reader.range(url, offset, offset + size), size, digest)


def _entry(manifest: Manifest, names: str) -> dict[str, Any]:
    """The entry "tokens" of a manifest. Raises DataError if there is none, or its format is unknown."""
    entry = manifest.details.get("tokens")
    if entry is None:
        raise DataError(
            f"{names}: holds {', '.join('.' + e for e in manifest.extensions)} and no tokens;"
            " make them with `unlabeled shards tokenize TEXT_SHARDS TARGET` and name that folder"
        )
    if entry["format"] not in (FORMAT, JOINED):
        raise DataError(
            f"{names}: has tokens of format {entry['format']}, but this version reads {FORMAT} and {JOINED}; tokenize"
            " again"
        )
    return entry


def _tokens(entry: dict[str, Any], manifest: Manifest, row: int) -> int:
    """The number of tokens of the shard in row `row` of a manifest."""
    name = manifest.names[row].rpartition("/")[2]
    if name not in entry["shards"]:
        raise DataError(
            f"{manifest.url(row)}: the manifest does not say how many tokens it has; tokenize the text again"
        )
    return entry["shards"][name]


def _check_tokenizers(entries: list[dict[str, Any]], specs: list[str]) -> None:
    if len({entry["tokenizer"] for entry in entries}) > 1:
        raise DataError(
            f"{', '.join(specs)}: were made with different tokenizers; tokenize them with the same one (--tokenizer"
            " FILE)"
        )
