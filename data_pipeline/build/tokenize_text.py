"""Tokenize text shards into token shards with a pool of worker processes. The shards do not depend on the number of
processes.

The documents are divided into tasks, each of consecutive documents with about `shard_mb` MB of text. Task 7 becomes
000007.tar (see shards/token_blocks.py for the format). Documents that cannot be used are left out and listed in
bad.jsonl. The same command resumes a stopped call, and does not repeat finished tasks.

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
from data_pipeline.build.text_pieces import CHARACTERS_AT_ONCE, pieces
from data_pipeline.shards import index, token_blocks
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_blocks import BLOCK, PAGE
from data_pipeline.shards.vocabulary import Vocabulary, is_byte_level, would_be_joined
from data_pipeline.storage.urls import open_store

FORMAT = 1  # version of the stored plan and of the stored results of tasks
# Counts of text that the tokens do not represent: tokens for unknown text, and characters that were dropped.
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
    _check_options(tokenizer_file, vocab, specials, shard_mb, block)
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
    joined = vocabulary.joined if vocabulary else would_be_joined([*tokenizer.SPECIALS, *specials])
    # Older versions did not store "joined".
    for stored_inputs in (inputs | {"joined": True}, inputs) if joined else (inputs,):
        if (finished := find_finished(target, stored_inputs)) is not None:
            return {**finished[1], "finished": True}
    inputs |= {"joined": True} if joined else {}
    folder = BuildFolder(target)
    try:
        if folder.claim(inputs) is None:
            folder.begin(inputs, {})
        # Not in the folder of the shards, where files that are not shards may be removed.
        tokenizer_folder = f"{folder.state}/tokenizer"
        if vocabulary is None:
            vocabulary = _train_or_read(samples, tokenizer_folder, vocab, specials, say)
        elif not _is_complete(tokenizer_folder):
            tokenizer.write_folder(tokenizer_folder, vocabulary)
        settings = {"source": source, "target": target, "tokenizer": tokenizer_folder, "block": block}
        tasks = list(plan(samples, int(shard_mb * 1e6)))
        parts = run_tasks(folder, work, settings, tasks, workers, "tokenize", "count")
        summary = _summary(parts, vocabulary)
        if not summary["tokens"]:
            folder.remove()
            first = "; the first one: {path}: {reason}".format(**summary["bad"][0]) if summary["bad"] else ""
            raise DataError(f"{source}: none of its documents can be used{first}")
        _publish(folder, summary, parts, vocabulary, inputs, say, workers)
    finally:
        folder.release()
    return summary


def _check_options(
    tokenizer_file: str | Path, vocab: int, specials: tuple[str, ...], shard_mb: float, block: int
) -> None:
    """Raises DataError for options of `tokenize` that are invalid or contradict each other."""
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


def _train_or_read(
    samples: Samples, folder: str, size: int, specials: tuple[str, ...], say: Callable[[str], None]
) -> Vocabulary:
    """Read the tokenizer in `folder`, which a stopped call may have trained. If there is none, train it first."""
    if not _is_complete(folder):
        tokenizer.train(samples.specs, folder, size, specials, say=say)
    return Vocabulary.read(folder)


def _is_complete(folder: str) -> bool:
    """Whether a folder holds all files of a tokenizer."""
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
    shard_end: list[int] = []  # tokens at the end of the shard
    if vocabulary.joined:  # the BOS of the next document ends a document; only the last document needs an EOS
        after, shard_end = [], after
    writer = _BlockWriter(file, tokenizer.smallest_dtype(vocabulary.size), block, f"{task['number']:06d}", shard_end)

    def tokens_of(texts: list[str]) -> Iterator[tuple[list[int], str]]:
        """Yield (tokens, text) for each text, and count unknown tokens and dropped characters."""
        nonlocal unknown, lost
        for text, encoded in zip(texts, encode(texts, add_special_tokens=False), strict=True):
            ids = encoded.ids
            unknown += ids.count(vocabulary.unk) if vocabulary.unk is not None else 0
            lost += vocabulary.count_dropped(text, encoder)
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


def _batches(samples: Samples, task: dict[str, int], bad: list, report: Report) -> Iterator[list[str]]:
    """Yield the documents of a task in lists of at most CHARACTERS_AT_ONCE characters together; a longer document is a
    list of one. Appends (name, reason) to `bad` for each document that cannot be read.
    """
    texts: list[str] = []
    size = 0
    for number in range(task["first"], task["first"] + task["count"]):
        report(1)
        try:
            text, reason = samples.read(number, ("txt",))["txt"].decode(), ""
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 ({error.reason} at byte {error.start})"
        except KeyError:
            reason = "has no .txt member"
        except Damaged as damage:
            reason = str(damage)
        if reason:
            bad.append(("/".join(samples.name(number)), reason))
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
    memory. `shard_end`: the tokens at the end of the shard.

    Each block ends with the first token of the next one, because the last input of a row needs a target.
    """

    def __init__(self, file: IO[bytes], dtype: np.dtype, block: int, name: str, shard_end: list[int]):
        self.tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by close)
        self.dtype, self.block, self.name, self.shard_end = dtype, block, name, shard_end
        self.waiting = np.zeros(0, dtype)  # tokens that are not written yet
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
        self.waiting = np.concatenate([self.waiting, np.array(ids, self.dtype)])
        self.count += len(ids)
        while len(self.waiting) > self.block + 1:  # `close` writes the rest, as the last block of the shard
            self._write_block(self.block + 1)
            written = bisect.bisect_left(self.starts, self.block)  # documents that begin in the written block
            self.starts = [start - self.block for start in self.starts[written:]]
            self.sizes = self.sizes[written:]
            self.waiting = self.waiting[self.block :]

    def _write_block(self, size: int) -> None:
        """Write the first `size` waiting tokens as a block."""
        data = self.waiting[:size].tobytes()
        documents = bisect.bisect_left(self.starts, size)  # that begin in the block
        docs = token_blocks.pack_docs(self.starts[:documents], self.sizes[:documents], data, self.dtype.itemsize)
        for extension, content in ((token_blocks.DOCS, docs), (token_blocks.TOKENS, data)):
            member = tarfile.TarInfo(f"{self.name}-{self.number:06d}.{extension}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        self.number += 1

    def close(self) -> None:
        """Write the last block and close the tar."""
        if self.documents:
            self._append(self.shard_end)
        if len(self.waiting) > 1:
            self._write_block(len(self.waiting))
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
    tokens_entry = {
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
    index.write(folder.shards, say, {"source": "tokens", "tokens": tokens_entry, "build": build}, workers)
    folder.publish()


def describe(summary: dict[str, Any], target: str) -> list[str]:
    """The lines to print about the result of `tokenize`."""
    bad = summary["bad"]
    out = left_out(bad, target)
    if summary.get("finished"):
        out.append(f"{target}: was built before, from the same text; nothing was done")
    loss_texts = ("tokens stand for text that the tokenizer does not know", "characters were dropped by the tokenizer")
    for key, loss_text in zip(LOSSES, loss_texts, strict=True):
        if summary.get(key):
            out.append(
                f"warning: {summary[key]} {loss_text} ({summary[key] / max(1, summary['tokens']):.2%} of all tokens):"
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
