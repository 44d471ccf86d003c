"""The kinds of sources that shards are built from, and the detection of the kind of a path."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from common.errors import DataError, nearest
from data_pipeline.build.sources.files import Images, Videos
from data_pipeline.build.sources.frames import Frames, check_every
from data_pipeline.build.sources.parquet import ParquetImages, Table
from data_pipeline.build.sources.source import Options, Source, Tree, check_bits, check_max_pixels
from data_pipeline.build.sources.tables import ImageText, json_row, names_images, read_rows
from data_pipeline.build.sources.tars import Tars, TarSubset
from data_pipeline.build.sources.text_files import CONVERT, Text
from data_pipeline.shards.members import MAX_MEMBER_BYTES
from data_pipeline.storage.urls import compressed_tar_hint

KINDS: dict[str, type[Source]] = {k.kind: k for k in (Images, Videos, Frames, Text, ImageText, ParquetImages, Tars)}
_ALL = {**KINDS, TarSubset.kind: TarSubset}


def open_source(kind: str, url: str, options: Options, limit: int, classes: list[str] | None = None) -> Source:
    """Open a source of a known kind, in a worker process."""
    return _ALL[kind](Tree(url), options, limit, classes)


def find_source(kind: str, url: str, options: Options, limit: int) -> Source:
    """Open the source at a path; its kind is detected unless it is given. Raises DataError."""
    if kind and kind not in _ALL:
        raise DataError(f"--kind {kind}: no such kind of source; {nearest(kind, KINDS)}")
    check_bits(options.bits)
    check_max_pixels(options.max_pixels)
    check_every(options)
    tree, named = Tree(url), bool(kind)
    if kind in ("", Images.kind) and (options.frames_every is not None or (kind and _only_videos(tree))):
        kind = Frames.kind
    source = _ALL[kind or detect(tree, options)](tree, options, limit)
    source.named = named
    for field in fields(Options):
        if (
            field.name not in (*source.reads, "low", "high", "further")
            and getattr(options, field.name) != field.default
        ):
            readers = ", ".join(k.kind for k in KINDS.values() if field.name in k.reads)
            flag = "--" + field.name.replace("_", "-")
            raise DataError(f"{flag} is not for a {source.title}, but for the kinds {readers}")
    if not source.files:
        files_of = Counter(file.extension or "no extension" for file in tree.files)
        listed = ", ".join(f"{n} .{e}" for e, n in files_of.most_common(5)) or "nothing"
        hint = compressed_tar_hint(tree.files[0].path) if tree.files else ""
        raise DataError(f"{url}: holds nothing for a {source.title}; it holds {listed}{hint}")
    return source


def _only_videos(tree: Tree) -> bool:
    """Whether a source holds videos and no images, so that its images can only be frames of the videos."""
    return any(Videos.takes(file) for file in tree.files) and not any(Images.takes(file) for file in tree.files)


def detect(tree: Tree, options: Options) -> str:
    """The kind of a source by the names of its files; of tables, by their columns.

    Raises DataError if none or several kinds fit.
    """
    files = tree.files
    if not files:
        raise DataError(f"{tree.url}: is an empty folder")
    files_of = {kind.kind: [f for f in files if kind.takes(f)] for kind in (Images, Videos, ParquetImages, Tars)}
    files_of["jsonl"] = [f for f in files if f.extension == "jsonl"]
    if files_of[Tars.kind]:  # tables beside shards are annotations of them
        del files_of["jsonl"], files_of[ParquetImages.kind]
    found = {_by_content(tree, kind, some[0].path, options): len(some) for kind, some in files_of.items() if some}
    if not found:  # these count only alone: beside other files, they are annotations
        found = {
            kind: len(some)
            for kind, endings in ((Text.kind, ("txt",)), (ImageText.kind, ("csv", "tsv")))
            if (some := [f for f in files if f.extension in endings])
        }
    if not found and (notes := [f for f in files if f.extension == "json"]):  # an annotation beside other files
        rows = read_rows(tree, notes[0].path)
        found = {ImageText.kind if names_images(next(rows, (0, {}))[1]) else Text.kind: len(notes)}
    if len(found) > 1:
        what = " and ".join(f"{n} files for {kind}" for kind, n in found.items())
        choices = " or ".join(f"--kind {kind}" for kind in found)
        raise DataError(f"{tree.url}: holds {what}; write {choices}")
    if not found:
        names = Counter(f".{f.extension}" if f.extension else "no extension" for f in files)
        endings = ", ".join(name for name, _ in names.most_common(5))
        for file in files:
            kind = file.path.lower().removesuffix(".gz").rpartition(".")[2]
            if kind in ("arrow", "wet"):
                line = CONVERT[kind].format(path=tree.place(file.path))
                line = (
                    f"zcat {tree.place(file.path)} | {line.replace(f' < {tree.place(file.path)}', '')}"
                    if file.extension == "gz"
                    else line
                )
                raise DataError(f"{tree.url}: holds .{kind} files, which become text by: {line}")
        raise DataError(
            f"{tree.url}: holds no source of shards (its files have {endings}); those are images, videos, "
            ".jsonl, .json, .txt, .parquet, .tar, and .csv or .tsv lists of image and text; --kind text takes any"
            " text file"
            f"{compressed_tar_hint(files[0].path)}"
        )
    return next(iter(found))


def _by_content(tree: Tree, kind: str, path: str, options: Options) -> str:
    if kind == "jsonl":
        try:
            with tree.open(path) as file:
                row, _ = json_row(file.readline(MAX_MEMBER_BYTES))
        except OSError:
            return Text.kind
        return ImageText.kind if options.image_field or names_images(row) else Text.kind
    if kind == ParquetImages.kind:
        try:
            with Table(tree, path) as table:
                return kind if options.image_field or table.holds_images() else Text.kind
        except DataError:
            if len([f for f in tree.files if f.extension == "parquet"]) == 1:
                raise
    return kind
