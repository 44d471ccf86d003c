"""Tokenize text shards into token shards with a pool of worker processes. The shards do not depend on the number of
processes.

The documents are divided into tasks, each of consecutive documents with about `shard_mb` MB of text. Task 7 becomes
000007.tar (see shards/token_blocks.py for the format). Documents that cannot be used are left out and listed in
bad.jsonl. If a call was stopped, the same command continues it, and finished tasks are not repeated.

Each process holds in memory the text of one document (at most MAX_MEMBER_BYTES) and the tokenizer's result for
CHARACTERS_AT_ONCE characters, which takes about 120 bytes per character. A longer document is tokenized in pieces
(`pieces`). A document of 50 MB (Python source, 18 million tokens of a vocabulary of 4096) took 476 MB at the peak.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from common import output, process_pool
from common.errors import Damaged, DataError, run_main
from common.process_pool import Report
from data_pipeline.build import tokenizer
from data_pipeline.build.build_folder import (
    BuildFolder,
    find_finished,
    left_out,
    normalized,
    run_tasks,
    write_bad_list,
    write_shard,
)
from data_pipeline.shards import index, token_blocks
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_blocks import BLOCK, PAGE
from data_pipeline.shards.vocabulary import Vocabulary, is_byte_level, joins
from data_pipeline.storage.urls import open_store

FORMAT = 1  # version of the stored plan and of the stored results of tasks
CHARACTERS_AT_ONCE = 1 << 20  # characters of text that are tokenized in one call
# Characters on each side of a cut that are tokenized with and without it, to check that the tokens do not change.
CUT_CONTEXT = 1 << 12
MAX_CUT_ATTEMPTS = 64  # positions of each kind (see `pieces`) that are tried before the piece is made longer
# Counts of text that the tokens do not represent: tokens that stand for unknown text, and characters that were dropped.
LOSSES = ("unknown", "lost")
INDEX_SAMPLES_AT_ONCE = 1 << 16  # number of samples whose index records are read at a time


def tokenize(
    source: str | Path,
    target: str | Path,
    tokenizer_file: str | Path = "",
    vocab: int = 0,
    specials: tuple[str, ...] = (),
    shard_mb: float = 256,
    block: int = BLOCK,
    *,
    workers: int = 0,
    say: Callable[[str], None] = output.say,
) -> dict[str, Any]:
    """Tokenize the text shards `source` (a folder, tar, glob or URL), and write token shards with an index, a manifest
    and a tokenizer.json to the folder `target`.

    The tokenizer is `tokenizer_file` (a tokenizer.json, or a folder that holds one); without it, a tokenizer of `vocab`
    tokens is trained on the source. `shard_mb`: MB of text per shard; `block`: the length in tokens of the longest row
    that can be read from the shards. Returns {"documents", "tokens", "bytes" (of the documents' text), "shards",
    "vocabulary", "unknown", "lost" (see LOSSES), "bad": [{"path", "reason"}]}. Raises DataError.
    """
    source, target, workers = str(source), normalized(str(target)), workers or process_pool.cores()
    if bool(tokenizer_file) == bool(vocab):
        raise DataError("write either --tokenizer FILE, or --vocab N for a new tokenizer of N tokens")
    if specials and tokenizer_file:
        raise DataError(
            "--specials is for a new tokenizer (--vocab), but --tokenizer names one that has its own special tokens;"
            " leave out one of the two options"
        )
    if shard_mb <= 0:
        raise DataError(f"--shard-mb {shard_mb}: write a number above 0")
    if block < PAGE or block % PAGE:
        raise DataError(
            f"--block {block}: a block consists of pages of {PAGE} tokens; write a multiple of {PAGE}, for example"
            f" {max(1, round(block / PAGE)) * PAGE}"
        )
    samples = Samples([source], say=say)
    if "txt" not in samples.extensions:
        present = ", ".join(f".{e}" for e in samples.extensions)
        raise DataError(f"{source}: holds {present} and no .txt; make text shards with `unlabeled shards build`")
    vocabulary = Vocabulary.read(str(tokenizer_file)) if tokenizer_file else None
    if vocabulary:
        vocabulary.tokenizer()  # raises DataError before any process is started
        vocabulary.check_unknown()
    inputs = {"format": FORMAT, "source": samples.id, "shard_mb": shard_mb, "block": block}
    inputs |= {"tokenizer": vocabulary.hash} if vocabulary else {"vocab": vocab, "specials": list(specials)}
    joined = vocabulary.joined if vocabulary else joins([*tokenizer.SPECIALS, *specials])
    for known in (inputs | {"joined": True}, inputs) if joined else (inputs,):  # older versions did not store "joined"
        if (made := find_finished(target, known)) is not None:
            return {**made[1], "finished": True}
    inputs |= {"joined": True} if joined else {}
    folder = BuildFolder(target)
    try:
        if folder.claim(inputs) is None:
            folder.begin(inputs, {})
        # Not in the folder of the shards, from which files that are no shards may be removed.
        tokenizer_folder = f"{folder.state}/tokenizer"
        if vocabulary is None:
            vocabulary = _trained(samples, tokenizer_folder, vocab, specials, say)
        elif not _is_complete(tokenizer_folder):
            tokenizer.write_folder(tokenizer_folder, vocabulary)
        settings = {"source": source, "target": target, "tokenizer": tokenizer_folder, "block": block}
        tasks = list(plan(samples, int(shard_mb * 1e6)))
        parts = run_tasks(folder, work, settings, tasks, workers, "tokenize", "count")
        summary = _summary(parts, vocabulary)
        if not summary["tokens"]:
            folder.remove()
            first = f"; the first: {summary['bad'][0]['path']}: {summary['bad'][0]['reason']}" if summary["bad"] else ""
            raise DataError(f"{source}: none of its documents can be used{first}")
        _publish(folder, summary, parts, vocabulary, inputs, say, workers)
    finally:
        folder.release()
    return summary


def _trained(
    samples: Samples, folder: str, size: int, specials: tuple[str, ...], say: Callable[[str], None]
) -> Vocabulary:
    """The tokenizer in `folder`, which a stopped call has trained; if there is none, train it."""
    if not _is_complete(folder):
        tokenizer.train(samples.specs, folder, size, specials, say=say)
    return Vocabulary.read(folder)


def _is_complete(folder: str) -> bool:
    fs, path = open_store(folder)
    return bool(fs.exists(f"{path}/tokenizer_config.json"))  # written last


# ---------------------------------------------------------------- the plan
def plan(samples: Samples, limit: int) -> Iterator[dict[str, int]]:
    """Yield the tasks {"number", "first", "count"}: `count` consecutive samples from number `first` on, which have at
    most `limit` bytes of text together, or a single larger sample.
    """
    (column,) = samples.columns(("txt",))
    number = begin = size = 0
    for first in range(0, len(samples), INDEX_SAMPLES_AT_ONCE):
        for piece in samples.pieces(first, min(INDEX_SAMPLES_AT_ONCE, len(samples) - first)):
            for sample, text_bytes in enumerate(piece.records[:, column]["size"].tolist(), piece.first):
                if sample > begin and size + text_bytes > limit:
                    yield {"number": number, "first": begin, "count": sample - begin}
                    number, begin, size = number + 1, sample, 0
                size += text_bytes
    yield {"number": number, "first": begin, "count": len(samples) - begin}


# ---------------------------------------------------------------- one task, in a worker process
_opened: dict[str, Any] = {}  # the samples and the tokenizer that this worker process has open, for all its tasks


def work(settings: dict[str, Any], task: dict[str, Any], report: Report) -> dict[str, Any]:
    """Run one task in a worker process: tokenize its documents into a shard."""
    key = json.dumps([settings["source"], settings["tokenizer"]])
    if key not in _opened:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks already run in parallel processes
        _opened.clear()
        _opened[key] = Samples([settings["source"]]), Vocabulary.read(settings["tokenizer"])
    samples, vocabulary = _opened[key]
    part = write_shard(
        settings["target"],
        task["number"],
        lambda file: _write(samples, vocabulary, task, settings["block"], file, report),
    )
    return {"number": task["number"], "part": part}


def _write(
    samples: Samples, vocabulary: Vocabulary, task: dict[str, int], block: int, file: IO[bytes], report: Report
) -> dict[str, Any]:
    """Write one shard to `file`. Returns its counts, and under "bad" the documents that were left out."""
    bad: list[tuple[str, str]] = []
    encoder = vocabulary.tokenizer()
    encode = encoder.encode_batch_fast
    unknown = lost = 0
    before, after = ([] if token is None else [token] for token in (vocabulary.bos, vocabulary.eos))
    last: list[int] = []  # tokens at the end of the shard
    if vocabulary.joined:  # one token both ends a document and begins the next: only the last document needs an end
        after, last = [], after
    writer = _BlockWriter(file, tokenizer.smallest_dtype(vocabulary.size), block, f"{task['number']:06d}", last)

    def tokens_of(texts: list[str]) -> Iterator[tuple[list[int], str]]:
        """Yield (tokens, text) for each text, and count what is unknown or lost."""
        nonlocal unknown, lost
        for text, encoded in zip(texts, encode(texts, add_special_tokens=False), strict=True):
            ids = encoded.ids
            unknown += ids.count(vocabulary.unk) if vocabulary.unk is not None else 0
            lost += vocabulary.lost(text, encoder)
            yield ids, text

    for texts in _batches(samples, task, bad, report):
        if len(texts[0]) > CHARACTERS_AT_ONCE:  # a single long document
            (text,) = texts
            parts = (ids for piece in pieces(text, encoder) for ids, _ in tokens_of([piece]))
            writer.add(itertools.chain([before], parts, [after]), len(text.encode()))
            continue
        for ids, text in tokens_of(texts):
            writer.add([[*before, *ids, *after]], len(text.encode()))
    writer.close()
    counts = {"tokens": writer.count, "documents": writer.documents, "bytes": writer.bytes}
    return {**counts, "unknown": unknown, "lost": lost, "bad": bad}


def pieces(text: str, encoder: Any, size: int = CHARACTERS_AT_ONCE) -> Iterator[str]:
    """Cut a long text into pieces of about `size` characters whose tokens, concatenated, are those of the whole text.

    A cut must not change the tokens. It is accepted if the text around it, CUT_CONTEXT characters on each side, has the
    same tokens as a whole and when its two halves are tokenized separately. Three kinds of positions are tried in turn:
    spaces between letters (also without the space, for tokenizers that add one before every text), ends of lines, and
    any position. If no cut is accepted, the piece becomes longer; a single word of megabytes remains one piece.
    """
    first = 0
    while len(text) - first > size:
        cut, length = None, size
        while cut is None and len(text) - first > length:
            cut = _safe_cut(text, first + length // 2, first + length, encoder)
            length *= 2
        if cut is None:
            break
        yield text[first : cut[0]]
        first = cut[1]
    yield text[first:]


def _safe_cut(text: str, low: int, high: int, encoder: Any) -> tuple[int, int] | None:
    """The last safe cut between the characters `low` and `high`, as (end of a piece, beginning of the next one); None
    if none of the positions that were tried is safe.
    """
    low = max(low, high - (1 << 16))
    places = range(high, low, -1)
    words = [p for p in places if text[p] == " " and text[p - 1].isalpha() and text[p + 1 : p + 2].isalpha()][
        :MAX_CUT_ATTEMPTS
    ]
    ends = [p for p in places if text[p - 1] == "\n" and not text[p].isspace()][:MAX_CUT_ATTEMPTS]
    for end, following in itertools.chain(
        ((p, p + skipped) for p in words for skipped in (0, 1)),
        ((p, p) for p in ends),
        ((p, p) for p in places[:MAX_CUT_ATTEMPTS]),
    ):
        parts = (
            text[end - CUT_CONTEXT : end + CUT_CONTEXT],
            text[end - CUT_CONTEXT : end],
            text[following : end + CUT_CONTEXT],
        )
        whole, left, right = (encoder.encode(part, add_special_tokens=False).ids for part in parts)
        if whole == left + right:
            return end, following
    return None


def _batches(samples: Samples, task: dict[str, int], bad: list, report: Report) -> Iterator[list[str]]:
    """Yield the documents of a task in lists of at most CHARACTERS_AT_ONCE characters together; a longer document has a
    list of its own. Appends (name, reason) to `bad` for each document that cannot be read.
    """
    texts: list[str] = []
    size = 0
    for number in range(task["first"], task["first"] + task["count"]):
        report(1)
        try:
            text = samples.read(number, ("txt",))["txt"].decode()
        except UnicodeDecodeError as error:
            bad.append(("/".join(samples.name(number)), f"is not UTF-8 ({error.reason} at byte {error.start})"))
            continue
        except KeyError:
            bad.append(("/".join(samples.name(number)), "has no .txt member"))
            continue
        except Damaged as reason:
            bad.append(("/".join(samples.name(number)), str(reason)))
            continue
        if texts and size + len(text) > CHARACTERS_AT_ONCE:
            yield texts
            texts, size = [], 0
        texts.append(text)
        size += len(text)
    if texts:
        yield texts


class _BlockWriter:
    """Writes the tokens of documents to a tar, block by block. It holds one block and one piece of a document in
    memory.

    Each block ends with the first token of the next one, since the last input of a row needs a target.
    """

    def __init__(self, file: IO[bytes], kind: np.dtype, block: int, name: str, last: list[int]):
        self.tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by close)
        self.kind, self.block, self.name, self.last = kind, block, name, last  # `last`: tokens that end the shard
        self.waiting = np.zeros(0, kind)  # tokens that are not written yet
        # For each document that begins in `waiting`: the position of its first token there, and the bytes of its text.
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.count = self.documents = self.bytes = self.number = 0

    def add(self, parts: Iterable[list[int]], size: int) -> None:
        """Append a document, whose tokens are the concatenated `parts`, and whose text has `size` bytes.

        A document without tokens is not counted.
        """
        begun = False
        for ids in parts:
            if ids and not begun:
                self.starts.append(len(self.waiting))
                self.sizes.append(size)
                self.documents, self.bytes, begun = self.documents + 1, self.bytes + size, True
            self._append(ids)

    def _append(self, ids: list[int]) -> None:
        self.waiting = np.concatenate([self.waiting, np.array(ids, self.kind)])
        self.count += len(ids)
        while len(self.waiting) > self.block + 1:  # `close` writes the rest, as the last block of the shard
            self._put(self.block + 1)
            rest = [(start - self.block, size) for start, size in zip(self.starts, self.sizes, strict=True)]
            self.starts, self.sizes = ([pair[n] for pair in rest if pair[0] >= 0] for n in (0, 1))
            self.waiting = self.waiting[self.block :]

    def _put(self, size: int) -> None:
        data = self.waiting[:size].tobytes()
        here = bisect.bisect_left(self.starts, size)
        docs = token_blocks.pack_docs(self.starts[:here], self.sizes[:here], data, self.kind.itemsize)
        for extension, content in ((token_blocks.DOCS, docs), (token_blocks.TOKENS, data)):
            member = tarfile.TarInfo(f"{self.name}-{self.number:06d}.{extension}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        self.number += 1

    def close(self) -> None:
        if self.documents:
            self._append(self.last)
        if len(self.waiting) > 1:
            self._put(len(self.waiting))
        self.tar.close()


# ---------------------------------------------------------------- all tasks
def _summary(parts: list[dict[str, Any]], vocabulary: Vocabulary) -> dict[str, Any]:
    sums = {key: sum(part.get(key, 0) for part in parts) for key in ("documents", "tokens", "bytes", *LOSSES)}
    bad = [{"path": path, "reason": reason} for part in parts for path, reason in part["bad"]]
    return {**sums, "shards": len(parts), "vocabulary": vocabulary.size, "bad": bad}


def _publish(
    folder: BuildFolder,
    summary: dict[str, Any],
    parts: list[dict[str, Any]],
    vocabulary: Vocabulary,
    inputs: dict[str, Any],
    say: Callable[[str], None],
    workers: int,
) -> None:
    write_bad_list(folder, summary["bad"])
    tokenizer.write_folder(folder.shards, vocabulary)
    about_tokens = {
        "format": token_blocks.JOINED if inputs.get("joined") else token_blocks.FORMAT,
        "dtype": tokenizer.smallest_dtype(vocabulary.size).str,
        "block": inputs["block"],
        "vocabulary": vocabulary.size,
        "tokenizer": vocabulary.hash,
        "pad": next((token for token in (vocabulary.pad, vocabulary.eos) if token is not None), 0),
        "exact_bytes": is_byte_level(json.loads(vocabulary.text)),
        "shards": {f"{number:06d}.tar": part["tokens"] for number, part in enumerate(parts)},
        **{key: summary[key] for key in ("documents", "tokens", "bytes")},
        **{key: summary[key] for key in LOSSES if summary[key]},
    }
    build = {**summary, "bad": len(summary["bad"]), "from": inputs}
    index.write(folder.shards, say, {"source": "tokens", "tokens": about_tokens, "build": build}, workers)
    folder.publish()


def describe(summary: dict[str, Any], target: str) -> list[str]:
    """The lines to print about the result of `tokenize`."""
    bad = summary["bad"]
    out = left_out(bad, target)
    if summary.get("finished"):
        out.append(f"{target}: is complete already and was made from the same text; nothing was done")
    for key, what in zip(
        LOSSES,
        ("tokens stand for text that the tokenizer does not know", "characters were dropped by the tokenizer"),
        strict=True,
    ):
        if summary.get(key):
            out.append(
                f"warning: {summary[key]} {what} ({summary[key] / max(1, summary['tokens']):.2%} of all tokens):"
                " the model is not trained on this text, and bits per byte do not measure how well it predicts it;"
                " a byte-level tokenizer (--vocab N) loses no text"
            )
    ratio = summary["bytes"] / max(1, summary["tokens"])
    out.append(
        f"{target}: {summary['documents']} documents, {summary['tokens']} tokens (vocabulary of"
        f" {summary['vocabulary']}),"
        f" {summary['bytes'] / 1e6:.1f} MB of text ({ratio:.2f} bytes per token) in {summary['shards']} shards,"
        f" {len(bad)} left out"
    )
    return out


if __name__ == "__main__":
    sys.exit(run_main(lambda: process_pool.serve(work)))
