"""Shards from every kind of source (`sources/`): planned once, written by many processes, the same bytes for any number of them.

The source is cut into tasks, in order and by size alone; task 7 becomes 000007.tar. What cannot be used is left out and listed with the reason
in bad.jsonl. A build that is stopped goes on with the tasks that are left when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from data_pipeline import crew, index
from data_pipeline.crew import Report
from data_pipeline.decode import IMAGES, Damaged, decode_image
from data_pipeline.index import MAX_MEMBER_BYTES, VIDEOS
from data_pipeline.sources import find_source, open_source
from data_pipeline.sources.base import Block, Entry, Options, Source, failure
from data_pipeline.sources.files import open_video
from data_pipeline.storage import DataError, is_local, stamp
from data_pipeline.workplace import Workplace, finished, left_out, normal, put_bad, put_shard, write_all
from pretrain.errors import command
from pretrain.progress import Progress

FORMAT = 1  # of plans and parts; another number, and a stopped build is not gone on with
TAR_END = 10240  # bytes of zeros that a tar ends in, at most


def build(
    source: str | Path,
    target: str | Path,
    shard_mb: float = 256,
    *,
    kind: str = "",
    options: Options | None = None,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write a source (a path or any fsspec URL) as shards of about `shard_mb` MB or less, with index and manifest.

    `kind` is one of `sources.KINDS`, "" for what the source holds; `workers` 0 stands for one process per core. Every image is decoded and of every
    video the first frame; what cannot be used is left out and listed. Returns the summary, which the manifest holds under "build" too:
    {"kind", "samples", "bytes" (of all members), "sample_bytes" {"smallest", "median", "largest"}, "shards", "members" {extension: count},
    "classes", "dropped" {extension: members that shards do not hold}, "unread" {extension: files that do not belong to the source}, "notes",
    "bad": [{"path", "reason"}]}.
    """
    source, target = str(source), normal(str(target))
    if shard_mb <= 0:
        raise DataError(f"--shard-mb {shard_mb}: write a number above 0")
    options, limit = options or Options(), int(shard_mb * 1e6)
    if is_local(source) and Path(target).is_relative_to(normal(source)):
        raise DataError(f"{target}: lies inside the source {source}; name a folder outside of it")
    held = find_source(kind, source, options, limit)
    place, workers = Workplace(target), workers or crew.cores()
    held.begin()
    about = _about(held, shard_mb)
    if (made := finished(target, about)) is not None:
        there, stored = made
        notes = [*stored["notes"], f"{target}: was built before, from the same files; nothing was done"]
        return {**stored, "classes": there.classes, "notes": notes}
    try:
        surveys = place.claim(about)
        settings = {"kind": held.kind, "source": source, "options": asdict(options), "limit": limit, "target": target}
        if surveys is None:
            surveys = _survey(held, settings, workers)
            place.begin(about, surveys)
        tasks = list(_tasks(held.blocks(surveys), limit))
        settings["classes"] = held.classes
        parts = write_all(place, work, settings, tasks, workers, "shards", "rows")
        bad = [*held.bad, *(pair for f in held.files for pair in surveys.get(f.path, {}).get("bad", []))]
        summary = _summary(held, parts, bad)
        if not summary["samples"]:
            place.remove()
            raise DataError(_nothing(source, held, summary["bad"]))
        _publish(place, summary, about, say, workers)
    finally:
        place.release()
    return summary


# ---------------------------------------------------------------- the plan
def _about(source: Source, shard_mb: float) -> dict[str, Any]:
    """What a plan depends on."""
    digest = hashlib.sha256()
    for file in [*source.files, *source.read_too()]:
        digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode(errors="surrogateescape"))
    digest.update(json.dumps(source.classes).encode())
    if source.options.labels:
        digest.update(stamp(source.options.labels).encode())
    about = {"format": FORMAT, "kind": source.kind, "source": source.tree.url, "shard_mb": shard_mb}
    return {**about, **asdict(source.options), "files": digest.hexdigest()}


def _survey(source: Source, settings: dict[str, Any], workers: int) -> dict[str, dict[str, Any]]:
    """What the source's `survey` says of each file that has to be looked into."""
    paths = source.looked_into()
    progress, out = Progress("look", len(paths)), {}
    for answer in crew.run(work, settings, [{"survey": path} for path in paths], workers, lambda rows: None):
        out[answer.pop("path")] = answer
        progress.update(len(out), "files")
    progress.close()
    return out


def _tasks(blocks: Iterable[Block], limit: int) -> Iterator[dict[str, Any]]:
    """{"number", "first" (row), "rows", "pieces": [[rows, piece]]}: consecutive blocks of at most `limit` bytes in all."""
    task: dict[str, Any] = {"number": 0, "first": 0, "rows": 0, "pieces": []}
    size = TAR_END
    for block in blocks:
        if task["rows"] and size + block.bytes > limit:
            yield task
            task = {"number": task["number"] + 1, "first": task["first"] + task["rows"], "rows": 0, "pieces": []}
            size = TAR_END
        task["pieces"].append([block.rows, block.piece])
        task["rows"] += block.rows
        size += block.bytes
    if task["rows"]:
        yield task


# ---------------------------------------------------------------- one task, in a worker process
def work(settings: dict[str, Any], task: dict[str, Any], report: Report) -> dict[str, Any]:
    """Answer a task: look into a file, or write a shard."""
    options = Options(**settings["options"])
    source = open_source(settings["kind"], settings["source"], options, settings["limit"], settings.get("classes"))
    if "survey" in task:
        return {"path": task["survey"], **source.survey(task["survey"])}
    part = put_shard(settings["target"], task["number"], lambda file: _write(source, task, file, report))
    return {"number": task["number"], "part": part}


def _write(source: Source, task: dict[str, Any], file: IO[bytes], report: Report) -> dict[str, Any]:
    """One shard; what it holds and what was left out."""
    from webdataset import TarWriter  # imports torch: not before it is needed

    sizes, members, dropped = Counter[int](), Counter[str](), Counter[str]()
    bad: list[tuple[str, str]] = []
    keys: set[str] = set()
    writer = TarWriter(file, mtime=0, encoder=False)
    for number, entry in _numbered(source, task):
        report(1)
        if entry is None:
            continue
        dropped.update(entry.dropped)
        reason = entry.reason or check(entry.members, source.decodes)
        key = "" if reason else source.key(number, entry)
        if key in keys:
            reason = f"the key {key} is taken by another sample of the same shard; `unlabeled shards build` makes keys unique"
        if reason:
            bad.append((entry.where, reason))
            continue
        keys.add(key)
        writer.write({"__key__": key, **entry.members})
        writer.tarstream.members.clear()  # else every header stays in memory
        sizes[sum(map(len, entry.members.values()))] += 1
        members.update(entry.members.keys())
    writer.close()
    return {"sizes": sorted(sizes.items()), "members": members, "dropped": dropped, "bad": bad}


def _numbered(source: Source, task: dict[str, Any]) -> Iterator[tuple[int, Entry | None]]:
    number = task["first"]
    for rows, piece in task["pieces"]:
        expected = number + rows
        try:
            for entry in source.entries(piece):
                yield number, entry
                number += 1
        except OSError as error:
            raise DataError(f"{source.tree.place(piece[0])}: cannot be read ({failure(error)})") from None
        if number != expected:
            raise DataError(f"{source.tree.place(piece[0])}: has changed while it was read; build again")


def check(members: dict[str, bytes], decode: bool = True) -> str:
    """Why a sample cannot be used, "" where it can."""
    for extension, data in members.items():
        if len(data) > MAX_MEMBER_BYTES:
            return f"{len(data)} bytes, but {MAX_MEMBER_BYTES} are allowed"
        try:
            if decode and extension in IMAGES:
                decode_image(data, extension)
            elif decode and extension in VIDEOS:
                open_video(data)
        except Damaged as damage:
            return str(damage)
    return ""


# ---------------------------------------------------------------- all tasks
def _summary(source: Source, parts: list[dict[str, Any]], bad: list[tuple[str, str]]) -> dict[str, Any]:
    sizes, members, dropped = Counter[int](), Counter[str](), Counter[str]()
    for part in parts:
        sizes.update({size: count for size, count in part["sizes"]})
        members.update(part["members"])
        dropped.update(part["dropped"])
        bad += part["bad"]
    unread = Counter(file.extension or "no extension" for file in source.unread())
    return {
        "kind": source.kind,
        "samples": sizes.total(),
        "bytes": sum(size * count for size, count in sizes.items()),
        "sample_bytes": _spread(sizes),
        "shards": len(parts),
        "members": dict(sorted(members.items())),
        "classes": source.classes,
        "dropped": dict(sorted(dropped.items())),
        "unread": dict(sorted(unread.items())),
        "notes": source.notes,
        "bad": [{"path": path, "reason": reason} for path, reason in bad],
    }


def _spread(sizes: Counter[int]) -> dict[str, int]:
    """Smallest, median (the lower one of two) and largest."""
    ordered, passed = sorted(sizes), 0
    for size in ordered:
        passed += sizes[size]
        if 2 * passed >= sizes.total():
            return {"smallest": ordered[0], "median": size, "largest": ordered[-1]}
    return {}


def _nothing(name: str, source: Source, bad: list[dict[str, str]]) -> str:
    if not bad:
        return f"{name}: {source.empty}"
    where, reason = bad[0]["path"], bad[0]["reason"]
    return f"{name}: none of its {len(bad)} samples can be used ({source.title}); {where}: {reason}"


def _publish(
    place: Workplace, summary: dict[str, Any], about: dict[str, Any], say: Callable[[str], None], workers: int
) -> None:
    put_bad(place, summary["bad"])
    stored = {k: v for k, v in summary.items() if k != "classes"}
    held = {**stored, "bad": len(summary["bad"]), "from": about}
    extra = {"classes": summary["classes"], "source": summary["kind"], "build": held}
    index.write(place.shards, say, extra, workers)
    place.publish()


def describe(summary: dict[str, Any], target: str) -> list[str]:
    """A summary in lines to print."""

    def counts(numbers: dict[str, int]) -> str:
        return ", ".join(f"{count} .{extension}" for extension, count in numbers.items())

    bad, spread = summary["bad"], summary["sample_bytes"]
    out = left_out(bad, target) + summary["notes"]
    if summary["dropped"]:
        out.append(f"members that shards do not hold: {counts(summary['dropped'])}")
    if summary["unread"]:
        out.append(f"files that are not part of the source: {counts(summary['unread'])}")
    out.append(f"members: {counts(summary['members'])}")
    kilobytes = {name: f"{size / 1e3:.1f} kB" for name, size in spread.items()}
    out.append("sample sizes: " + ", ".join(f"{name} {size}" for name, size in kilobytes.items()))
    out.append(
        f"{target}: {summary['samples']} samples, {summary['bytes'] / 1e6:.1f} MB in {summary['shards']} shards,"
        f" {len(summary['classes'])} classes, {len(bad)} left out"
    )
    return out


if __name__ == "__main__":
    sys.exit(command(lambda: crew.serve(work)))
