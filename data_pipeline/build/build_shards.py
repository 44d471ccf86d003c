"""Build shards from every kind of source (`sources/`). A build is planned once, and a process pool writes the shards;
their bytes do not depend on the number of processes.

The plan divides the source into tasks of consecutive rows by their size; task 7 writes 000007.tar. Samples that cannot
be used are left out of the shards and listed with the reason in bad.jsonl. The same command resumes a stopped build and
does not repeat finished tasks.
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

from common import output, process_pool
from common.errors import Damaged, DataError, run_main
from common.process_pool import Report
from common.progress import Progress
from data_pipeline.build.build_folder import (
    BuildFolder,
    find_finished,
    left_out,
    normalized,
    run_tasks,
    write_bad_list,
    write_shard,
)
from data_pipeline.build.sources import find_source, open_source
from data_pipeline.build.sources.source import Block, Entry, Options, Source
from data_pipeline.build.sources.source_files import reason_of
from data_pipeline.build.stats import Pixels, classes_line
from data_pipeline.formats.decode import ImageFacts, inspect
from data_pipeline.formats.image_formats import ARRAY, IMAGE_MEMBERS, IMAGES
from data_pipeline.formats.videos import video_facts
from data_pipeline.formats.waveforms import decode
from data_pipeline.shards import durations, index
from data_pipeline.shards.members import AUDIO, CONTENT_EXTENSIONS, MAX_MEMBER_BYTES, VIDEOS
from data_pipeline.shards.samples import Samples
from data_pipeline.storage.urls import is_local, stamp

FORMAT = 3  # format of stored plans and task results; a stopped build with another format is not resumed
# If dropped members have more distinct endings (05.jpg) than this, they are counted by their last part (jpg).
MAX_ENDINGS = 50
# Default values of keys that the summaries of older versions lack.
MISSING_IN_OLD_SUMMARIES: dict[str, Any] = {"examples": {}, "pixels": {}, "remarks": {}, "bare": []}
CHECK_RATE = 8000  # Hz at which recordings are decoded to find those that cannot be used
TAR_END = 10240  # largest number of zero bytes at the end of a tar


def build(
    source: str | Path,
    target: str | Path,
    shard_mb: float = 256,
    *,
    kind: str = "",
    options: Options | None = None,
    workers: int = 0,
    say: Callable[[str], None] = output.say,
) -> dict[str, Any]:
    """Write a source (a path or any fsspec URL) as shards of at most about `shard_mb` MB, with index and manifest.

    `kind` is one of `sources.KINDS`, or "" to detect it. `workers` = 0 stands for one process per core. To find the
    samples that cannot be used, every image is decoded, and the first frame of every video. Returns the summary; the
    manifest stores it under "build" as well, without "classes" and with the number of "bad" samples only:

        kind            the kind of the source
        shards          the number of tars
        samples, bytes  the number of samples, and the bytes of all their members
        classes         the names of the classes; the number of a class is its position
        sample_bytes    {"smallest", "median", "largest"}
        members         {extension: number of members}
        dropped         {extension: number of members that shards do not hold}
        unread          {extension: number of files that are not part of the source}
        examples        {extension: a file or row}, for the extensions of `dropped` and `unread`
        pixels          {format, bits and channels: [number of images, lowest value, highest value]}
        remarks         {remark on images: [number of images, example]}
        bare            [number of samples without an image, example]; [] if there is none, or no image at all
        bits            the option of that name
        notes           lines to print
        bad             [{"path", "reason"}] of the samples that were left out
    """
    source, target = str(source), normalized(str(target))
    if shard_mb <= 0:
        raise DataError(f"--shard-mb {shard_mb}: write a number above 0")
    options, limit = options or Options(), int(shard_mb * 1e6)
    if is_local(source) and Path(target).is_relative_to(normalized(source)):
        raise DataError(f"{target}: lies inside the source {source}; name a folder outside of it")
    rows = find_source(kind, source, options, limit)
    folder, workers = BuildFolder(target), workers or process_pool.cores()
    rows.begin()
    inputs = _inputs(rows, shard_mb)
    defaults = asdict(Options())
    if (finished := find_finished(target, inputs, defaults)) is not None:
        manifest, stored = finished
        notes = [*stored["notes"], f"{target}: was built before, from the same files; nothing was done"]
        defaults_of_summary = {**MISSING_IN_OLD_SUMMARIES, "bits": rows.options.bits}
        return {**defaults_of_summary, **stored, "classes": manifest.classes, "notes": notes}
    try:
        surveys = folder.claim(inputs, defaults)
        settings = {
            "kind": rows.kind,
            "source": source,
            "options": asdict(rows.options),
            "limit": limit,
            "target": target,
        }
        if surveys is None:
            surveys = _survey(rows, settings, workers)
            folder.begin(inputs, surveys)
        tasks = list(_tasks(rows.blocks(surveys), limit))
        settings["classes"] = rows.classes
        parts = run_tasks(folder, work, settings, tasks, workers, "shards", "rows")
        bad = list(rows.bad)
        for file in rows.files:
            bad += surveys.get(file.path, {}).get("bad", [])
        summary = _summary(rows, parts, bad)
        if not summary["samples"]:
            folder.remove()
            raise DataError(_no_samples_message(source, rows, summary["bad"]))
        _publish(folder, summary, rows.options, inputs, say, workers)
    finally:
        folder.release()
    return summary


# ---------------------------------------------------------------- the plan
def _inputs(source: Source, shard_mb: float) -> dict[str, Any]:
    """Everything that a plan depends on. A stopped build is resumed only by a command with equal values."""
    digest = hashlib.sha256()
    for file in [*source.files, *source.extra_files()]:
        digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode(errors="surrogateescape"))
    digest.update(json.dumps(source.classes).encode())
    if source.options.labels:
        digest.update(stamp(source.options.labels).encode())
    head = {"format": FORMAT, "kind": source.kind, "source": source.tree.url, "shard_mb": shard_mb}
    return {**head, **asdict(source.options), "files": digest.hexdigest()}


def _survey(source: Source, settings: dict[str, Any], workers: int) -> dict[str, dict[str, Any]]:
    """Call `Source.survey` in the process pool for each file that must be read before the source can be divided into
    blocks. Returns {path: result}."""
    paths = source.files_to_survey()
    progress, surveys = Progress("survey", len(paths)), {}
    for result in process_pool.run(work, settings, [{"survey": path} for path in paths], workers, lambda rows: None):
        surveys[result.pop("path")] = result
        progress.update(len(surveys), "files")
    progress.close()
    return surveys


def _tasks(blocks: Iterable[Block], limit: int) -> Iterator[dict[str, Any]]:
    """Group consecutive blocks into tasks whose shards have at most about `limit` bytes; a larger block is one task.

    A task is {"number", "first": its first row in the source, "rows": number of its rows, "pieces": [[rows, piece] of
    each block]}.
    """
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
    """Run one task in a worker process: survey a file, or write a shard."""
    options = Options(**settings["options"])
    source = open_source(settings["kind"], settings["source"], options, settings["limit"], settings.get("classes"))
    if "survey" in task:
        return {"path": task["survey"], **source.survey(task["survey"])}
    part = write_shard(settings["target"], task["number"], lambda file: _write(source, task, file, report))
    return {"number": task["number"], "part": part}


def _write(source: Source, task: dict[str, Any], file: IO[bytes], report: Report) -> dict[str, Any]:
    """Write the shard of a task. Returns its part of the summary (see `build`), with "sizes": [(bytes, number of
    samples of that size)].
    """
    from webdataset import TarWriter  # here, because it imports torch

    sizes, members, dropped = Counter[int](), Counter[str](), Counter[str]()
    bad: list[tuple[str, str]] = []
    keys: set[str] = set()
    pixels, examples, without_image = Pixels(), dict[str, str](), list[str]()
    writer = TarWriter(file, mtime=0, encoder=False)
    for number, entry in _numbered(source, task):
        report(1)
        if entry is None:
            continue
        dropped.update(entry.dropped)
        for extension in entry.dropped:
            examples.setdefault(extension, entry.where)
        reason, image_facts = entry.reason, list[ImageFacts]()
        if not reason and source.decodes:
            reason, image_facts = check(entry.members, source.options)
        key = "" if reason else source.key(number, entry)
        if key in keys:
            reason = f"another sample of the same shard has the key {key}; `unlabeled shards build` makes keys unique"
        if reason:
            bad.append((entry.where, reason))
            continue
        keys.add(key)
        for facts in image_facts:
            pixels.add(facts, entry.where)
        if not any(extension in (*IMAGE_MEMBERS, *VIDEOS) for extension in entry.members):
            without_image.append(entry.where)
        writer.write({"__key__": key, **entry.members})
        writer.tarstream.members.clear()  # otherwise tarfile keeps every header in memory
        sizes[sum(map(len, entry.members.values()))] += 1
        members.update(entry.members.keys())
    writer.close()
    return {
        "sizes": sorted(sizes.items()),
        "members": members,
        "dropped": dropped,
        "bad": bad,
        "pixels": pixels,
        "remarks": pixels.remarks,
        "examples": examples,
        "bare": [len(without_image), *without_image[:1]],
    }


def _numbered(source: Source, task: dict[str, Any]) -> Iterator[tuple[int, Entry | None]]:
    """(row number in the source, entry) of each row of a task.

    Raises DataError if a file cannot be read, or if the number of its rows is not the planned one.
    """
    number = task["first"]
    for rows, piece in task["pieces"]:
        expected = number + rows
        try:
            for entry in source.entries(piece):
                yield number, entry
                number += 1
        except OSError as error:
            raise DataError(f"{source.tree.full_path(piece[0])}: cannot be read ({reason_of(error)})") from None
        if number != expected:
            raise DataError(f"{source.tree.full_path(piece[0])}: has changed while it was read; build again")


def check(members: dict[str, bytes], options: Options) -> tuple[str, list[ImageFacts]]:
    """Decode the images, videos and recordings of a sample: (why it cannot be used, or "" if it can; facts about its images)."""
    facts: list[ImageFacts] = []
    # An array is decoded as an image only if the sample has no other content.
    decode_arrays = not any(extension in CONTENT_EXTENSIONS and extension != ARRAY for extension in members)
    for extension, data in members.items():
        if len(data) > MAX_MEMBER_BYTES:
            return f"holds {len(data)} bytes, but at most {MAX_MEMBER_BYTES} are allowed", facts
        try:
            if extension in IMAGES or (extension == ARRAY and decode_arrays):
                facts.append(inspect(data, extension, options.bits, options.as_stored, options.max_pixels))
            elif extension in VIDEOS:
                video_facts(data)
            elif extension in AUDIO:
                decode(data, CHECK_RATE)
        except Damaged as damage:
            return str(damage), facts
    return "", facts


# ---------------------------------------------------------------- all tasks
def _summary(source: Source, parts: list[dict[str, Any]], bad: list[tuple[str, str]]) -> dict[str, Any]:
    """The summary of a build (see `build`) from the results of its tasks. `bad`: what the planning process left out."""
    sizes, members, dropped = Counter[int](), Counter[str](), Counter[str]()
    pixels, examples = Pixels(), dict[str, str]()
    without_image, first_without_image = 0, list[str]()  # number of samples, the first example
    for part in parts:
        sizes.update({size: count for size, count in part["sizes"]})
        members.update(part["members"])
        dropped.update(part["dropped"])
        bad += part["bad"]
        pixels.merge(part["pixels"], part["remarks"])
        examples = {**part["examples"], **examples}
        count, *example = part["bare"]
        without_image += count
        first_without_image = first_without_image or example
    if len(dropped) > MAX_ENDINGS:  # endings such as 05.jpg, 06.jpg, …
        by_full_extension, dropped = dropped, Counter[str]()
        for ending, count in by_full_extension.items():
            short = ending.rpartition(".")[2]
            dropped[short] += count
            examples.setdefault(short, examples.get(ending, ""))
        examples = {ending: example for ending, example in examples.items() if ending in dropped}
    unread = Counter[str]()
    for file in source.unread():
        ending = file.extension or "no extension"
        unread[ending] += 1
        examples.setdefault(ending, file.path)
    return {
        "kind": source.kind,
        "samples": sizes.total(),
        "bytes": sum(size * count for size, count in sizes.items()),
        "sample_bytes": _size_quantiles(sizes),
        "shards": len(parts),
        "members": dict(sorted(members.items())),
        "classes": source.classes,
        "dropped": dict(sorted(dropped.items())),
        "unread": dict(sorted(unread.items())),
        "examples": examples,
        "pixels": pixels,
        "remarks": pixels.remarks,
        "bare": [without_image, *first_without_image] if pixels and without_image else [],
        "bits": source.options.bits,
        "notes": source.notes,
        "bad": [{"path": path, "reason": reason} for path, reason in bad],
    }


def _size_quantiles(sizes: Counter[int]) -> dict[str, int]:
    """The smallest, median and largest size; the median is the lower one if there are two middle sizes."""
    ordered, cumulative = sorted(sizes), 0
    for size in ordered:
        cumulative += sizes[size]
        if 2 * cumulative >= sizes.total():
            return {"smallest": ordered[0], "median": size, "largest": ordered[-1]}
    return {}


def _no_samples_message(name: str, source: Source, bad: list[dict[str, str]]) -> str:
    if not bad:
        return f"{name}: {source.empty}"
    where, reason = bad[0]["path"], bad[0]["reason"]
    return f"{name}: none of its {len(bad)} samples can be used ({source.title}); {where}: {reason}"


def _publish(
    folder: BuildFolder,
    summary: dict[str, Any],
    options: Options,
    inputs: dict[str, Any],
    say: Callable[[str], None],
    workers: int,
) -> None:
    """Write bad.jsonl, the index and the manifest beside the finished shards, and move them to the target together."""
    write_bad_list(folder, summary["bad"])
    stored = {k: v for k, v in summary.items() if k != "classes"}
    build_entry = {**stored, "bad": len(summary["bad"]), "from": inputs}
    extra = {"classes": summary["classes"], "source": summary["kind"], "build": build_entry, **options.pixels}
    index.write(folder.shards, say, extra, workers, summary["members"])
    if {*AUDIO} & {*summary["members"]}:
        durations.write(Samples([folder.shards], say=say), say)
    folder.publish()


def describe(summary: dict[str, Any], target: str) -> list[str]:
    """The lines to print about a summary."""

    def counts(numbers: dict[str, int], examples: dict[str, str]) -> str:
        names = {e: e if e == "no extension" else f".{e}" for e in numbers}
        notes = {e: f" ({examples[e]})" if e in examples else "" for e in numbers}
        return ", ".join(f"{count} {names[e]}{notes[e]}" for e, count in numbers.items())

    bad, quantiles = summary["bad"], summary["sample_bytes"]
    out = left_out(bad, target) + summary["notes"]
    if summary["dropped"]:
        out.append(f"members that shards do not hold: {counts(summary['dropped'], summary['examples'])}")
    if summary["unread"]:
        out.append(f"files that are not part of the source: {counts(summary['unread'], summary['examples'])}")
    if summary["bare"]:
        count, example = summary["bare"]
        out.append(f"{count} samples hold no image, for example {example}; training on images skips them")
    out += Pixels(summary["pixels"], summary["remarks"]).lines(summary["bits"])
    out.append(f"members: {counts(summary['members'], {})}; {classes_line(summary['classes'])}")
    kilobytes = {name: f"{size / 1e3:.1f} kB" for name, size in quantiles.items()}
    out.append("sample sizes: " + ", ".join(f"{name} {size}" for name, size in kilobytes.items()))
    out.append(
        f"{target}: {summary['samples']} samples, {summary['bytes'] / 1e6:.1f} MB in {summary['shards']} shards,"
        f" {len(summary['classes'])} classes, {len(bad)} left out"
    )
    return out


if __name__ == "__main__":
    sys.exit(run_main(lambda: process_pool.serve(work)))
