"""Text shards to token shards: planned once by size, tokenized by many processes, the same bytes for any number of them.

Task 7 is a run of consecutive documents of about `shard_mb` MB of text and becomes 000007.tar (tokens.py says what is in it). What cannot be used is left
out and listed in bad.jsonl. Tokenizing that is stopped goes on with the tasks that are left when the same command is given again.
"""

from __future__ import annotations

import bisect
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline import crew, index, tokenizer, tokens
from data_pipeline.crew import Report
from data_pipeline.decode import Damaged
from data_pipeline.shards import Samples
from data_pipeline.storage import DataError, open_store
from data_pipeline.tokens import BLOCK, PAGE
from data_pipeline.vocabulary import Vocabulary, is_byte_level
from data_pipeline.workplace import Workplace, finished, left_out, normal, put_bad, put_shard, write_all
from pretrain.errors import command

FORMAT = 1  # of plans and parts
AT_ONCE = 4 << 20  # bytes of text that are tokenized in one call
PLANNED = 1 << 16  # samples whose index is read at a time


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
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write text shards (a folder, tar, glob or URL) as token shards, with index, manifest and tokenizer.json.

    The tokenizer is `tokenizer_file` (a tokenizer.json, or a folder that holds one), or is trained on the source with `vocab` tokens. `shard_mb`: MB of text
    of a shard; `block`: the longest row that can be read, in tokens. Returns {"documents", "tokens", "bytes" (of their text), "shards", "vocabulary", "bad": [{"path", "reason"}]}.
    """
    source, target, workers = str(source), normal(str(target)), workers or crew.cores()
    if bool(tokenizer_file) == bool(vocab):
        raise DataError("write either --tokenizer FILE, or --vocab N for a new tokenizer of N tokens")
    if specials and tokenizer_file:
        raise DataError("--specials is for a new tokenizer (--vocab); that of --tokenizer has its own")
    if shard_mb <= 0:
        raise DataError(f"--shard-mb {shard_mb}: write a number above 0")
    if block < PAGE or block % PAGE:
        raise DataError(
            f"--block {block}: write a multiple of {PAGE}, the tokens of a page; {max(1, round(block / PAGE)) * PAGE}, for example"
        )
    samples = Samples([source], say=say)
    if "txt" not in samples.extensions:
        held = ", ".join(f".{e}" for e in samples.extensions)
        raise DataError(f"{source}: holds {held} and no .txt; make text shards with `unlabeled shards build`")
    given = Vocabulary.read(str(tokenizer_file)) if tokenizer_file else None
    if given:
        given.tokenizer()  # refused before there are processes
    about = {"format": FORMAT, "source": samples.id, "shard_mb": shard_mb, "block": block}
    about |= {"tokenizer": given.hash} if given else {"vocab": vocab, "specials": list(specials)}
    if (made := finished(target, about)) is not None:
        return {**made[1], "finished": True}
    place = Workplace(target)
    try:
        if place.claim(about) is None:
            place.begin(about, {})
        text = f"{place.state}/tokenizer"  # not in the shards' folder: that may be swept of what is no shard
        if given is None:
            given = _trained(samples, text, vocab, specials, say)
        elif not _whole(text):
            tokenizer.write_folder(text, given)
        settings = {"source": source, "target": target, "tokenizer": text, "block": block}
        tasks = list(plan(samples, int(shard_mb * 1e6)))
        parts = write_all(place, work, settings, tasks, workers, "tokenize", "count")
        summary = _summary(parts, given)
        if not summary["tokens"]:
            place.remove()
            why = f"; {summary['bad'][0]['path']}: {summary['bad'][0]['reason']}" if summary["bad"] else ""
            raise DataError(f"{source}: none of its documents can be used{why}")
        _publish(place, summary, parts, given, about, say, workers)
    finally:
        place.release()
    return summary


def _trained(
    samples: Samples, folder: str, size: int, specials: tuple[str, ...], say: Callable[[str], None]
) -> Vocabulary:
    """The tokenizer of a stopped call, or a new one."""
    if not _whole(folder):
        tokenizer.train(samples.specs, folder, size, specials, say=say)
    return Vocabulary.read(folder)


def _whole(folder: str) -> bool:
    fs, path = open_store(folder)
    return bool(fs.exists(f"{path}/tokenizer_config.json"))  # written last


# ---------------------------------------------------------------- the plan
def plan(samples: Samples, limit: int) -> Iterator[dict[str, int]]:
    """{"number", "first", "count"}: consecutive samples with at most `limit` bytes of text in all, or one."""
    (column,) = samples.columns(("txt",))
    number = begin = size = 0
    for first in range(0, len(samples), PLANNED):
        for piece in samples.pieces(first, min(PLANNED, len(samples) - first)):
            for at, more in enumerate(piece.records[:, column]["size"].tolist(), piece.first):
                if at > begin and size + more > limit:
                    yield {"number": number, "first": begin, "count": at - begin}
                    number, begin, size = number + 1, at, 0
                size += more
    yield {"number": number, "first": begin, "count": len(samples) - begin}


# ---------------------------------------------------------------- one task, in a worker process
_open: dict[str, Any] = {}  # a worker opens its source and its tokenizer once


def work(settings: dict[str, Any], task: dict[str, Any], report: Report) -> dict[str, Any]:
    """Answer a task: tokenize its documents into a shard."""
    key = json.dumps([settings["source"], settings["tokenizer"]])
    if key not in _open:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are parallel already
        _open.clear()
        _open[key] = Samples([settings["source"]]), Vocabulary.read(settings["tokenizer"])
    samples, vocabulary = _open[key]
    part = put_shard(
        settings["target"],
        task["number"],
        lambda file: _write(samples, vocabulary, task, settings["block"], file, report),
    )
    return {"number": task["number"], "part": part}


def _write(
    samples: Samples, vocabulary: Vocabulary, task: dict[str, int], block: int, file: IO[bytes], report: Report
) -> dict[str, Any]:
    """One shard; what it holds and what was left out."""
    bad: list[tuple[str, str]] = []
    writer = _Blocks(file, tokenizer.smallest(vocabulary.size), block, f"{task['number']:06d}")
    encode = vocabulary.tokenizer().encode_batch_fast
    before, after = ([] if one is None else [one] for one in (vocabulary.bos, vocabulary.eos))
    for texts in _batches(samples, task, bad, report):
        for text, encoded in zip(texts, encode(texts, add_special_tokens=False), strict=True):
            writer.add([*before, *encoded.ids, *after], len(text.encode()))
    writer.close()
    return {"tokens": writer.count, "documents": writer.documents, "bytes": writer.bytes, "bad": bad}


def _batches(samples: Samples, task: dict[str, int], bad: list, report: Report) -> Iterator[list[str]]:
    """The documents of a task, a few megabytes at a time; those that cannot be read go to `bad`."""
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
        texts.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


class _Blocks:
    """Documents in, blocks of a tar out; holds one block and one document."""

    def __init__(self, file: IO[bytes], kind: np.dtype, block: int, name: str):
        self.tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by close)
        self.kind, self.block, self.name = kind, block, name
        self.waiting = np.zeros(0, kind)  # tokens that are not written yet
        self.starts: list[int] = []  # of the documents that begin in them
        self.sizes: list[int] = []
        self.count = self.documents = self.bytes = self.number = 0

    def add(self, ids: list[int], size: int) -> None:
        if not ids:
            return
        self.starts.append(len(self.waiting))
        self.sizes.append(size)
        self.waiting = np.concatenate([self.waiting, np.array(ids, self.kind)])
        self.count, self.documents, self.bytes = self.count + len(ids), self.documents + 1, self.bytes + size
        while len(self.waiting) > self.block + 1:  # the last block ends with the shard
            self._put(self.block + 1)
            rest = [(start - self.block, size) for start, size in zip(self.starts, self.sizes, strict=True)]
            self.starts, self.sizes = ([pair[n] for pair in rest if pair[0] >= 0] for n in (0, 1))
            self.waiting = self.waiting[self.block :]

    def _put(self, size: int) -> None:
        data = self.waiting[:size].tobytes()
        here = bisect.bisect_left(self.starts, size)
        docs = tokens.pack_docs(self.starts[:here], self.sizes[:here], data, self.kind.itemsize)
        for extension, content in ((tokens.DOCS, docs), (tokens.TOKENS, data)):
            member = tarfile.TarInfo(f"{self.name}-{self.number:06d}.{extension}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))
        self.tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
        self.number += 1

    def close(self) -> None:
        if len(self.waiting) > 1:
            self._put(len(self.waiting))
        self.tar.close()


# ---------------------------------------------------------------- all tasks
def _summary(parts: list[dict[str, Any]], vocabulary: Vocabulary) -> dict[str, Any]:
    sums = {key: sum(part[key] for part in parts) for key in ("documents", "tokens", "bytes")}
    bad = [{"path": path, "reason": reason} for part in parts for path, reason in part["bad"]]
    return {**sums, "shards": len(parts), "vocabulary": vocabulary.size, "bad": bad}


def _publish(
    place: Workplace,
    summary: dict[str, Any],
    parts: list[dict[str, Any]],
    vocabulary: Vocabulary,
    about: dict[str, Any],
    say: Callable[[str], None],
    workers: int,
) -> None:
    put_bad(place, summary["bad"])
    tokenizer.write_folder(place.shards, vocabulary)
    held = {
        "format": tokens.FORMAT,
        "dtype": tokenizer.smallest(vocabulary.size).str,
        "block": about["block"],
        "vocabulary": vocabulary.size,
        "tokenizer": vocabulary.hash,
        "pad": next((one for one in (vocabulary.pad, vocabulary.eos) if one is not None), 0),
        "exact_bytes": is_byte_level(json.loads(vocabulary.text)),
        "shards": {f"{number:06d}.tar": part["tokens"] for number, part in enumerate(parts)},
        **{key: summary[key] for key in ("documents", "tokens", "bytes")},
    }
    build = {**summary, "bad": len(summary["bad"]), "from": about}
    index.write(place.shards, say, {"source": "tokens", "tokens": held, "build": build}, workers)
    place.publish()


def describe(summary: dict[str, Any], target: str) -> list[str]:
    """A summary in lines to print."""
    bad = summary["bad"]
    out = left_out(bad, target)
    if summary.get("finished"):
        out.append(f"{target}: was made before, from the same text; nothing was done")
    ratio = summary["bytes"] / max(1, summary["tokens"])
    out.append(
        f"{target}: {summary['documents']} documents, {summary['tokens']} tokens of {summary['vocabulary']},"
        f" {summary['bytes'] / 1e6:.1f} MB of text ({ratio:.2f} bytes a token) in {summary['shards']} shards, {len(bad)} left out"
    )
    return out


if __name__ == "__main__":
    sys.exit(command(lambda: crew.serve(work)))
