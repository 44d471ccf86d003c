"""The kinds of sources that shards are built from, and how to tell which one a path holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from data_pipeline.sources.base import Options, Source, Tree
from data_pipeline.sources.files import Images, Videos
from data_pipeline.sources.parquet import ParquetImages, Table
from data_pipeline.sources.tables import ImageText, json_row, names_images
from data_pipeline.sources.tars import Tars, TarsPart
from data_pipeline.sources.text import Text
from data_pipeline.storage import DataError
from pretrain.errors import nearest

KINDS: dict[str, type[Source]] = {k.kind: k for k in (Images, Videos, Text, ImageText, ParquetImages, Tars)}
_ALL = {**KINDS, TarsPart.kind: TarsPart}


def open_source(kind: str, url: str, options: Options, limit: int, classes: list[str] | None = None) -> Source:
    """A source of a known kind; what a worker process opens."""
    return _ALL[kind](Tree(url), options, limit, classes)


def find_source(kind: str, url: str, options: Options, limit: int) -> Source:
    """The source at a path; its kind follows from what is there unless it is given. Raises DataError."""
    if kind and kind not in _ALL:
        raise DataError(f"--kind {kind}: no such kind of source; {nearest(kind, KINDS)}")
    tree = Tree(url)
    source = _ALL[kind or detect(tree, options)](tree, options, limit)
    for field in fields(Options):
        if field.name not in (*source.reads, "low", "high") and getattr(options, field.name) != field.default:
            readers = ", ".join(k.kind for k in KINDS.values() if field.name in k.reads)
            flag = "--" + field.name.replace("_", "-")
            raise DataError(f"{flag} is not for a {source.title}, but for the kinds {readers}")
    if not source.files:
        held = Counter(file.extension or "no extension" for file in tree.files)
        there = ", ".join(f"{n} .{e}" for e, n in held.most_common(5)) or "nothing"
        raise DataError(f"{url}: holds nothing for a {source.title}; it holds {there}")
    return source


def detect(tree: Tree, options: Options) -> str:
    """The kind of source by what its files are called; of tables, by their columns. Raises DataError where two kinds would do."""
    files = tree.files
    if not files:
        raise DataError(f"{tree.url}: is an empty folder")
    held = {kind.kind: [f for f in files if kind.takes(f)] for kind in (Images, Videos, ParquetImages, Tars)}
    held["jsonl"] = [f for f in files if f.extension == "jsonl"]
    if held[Tars.kind]:  # tables beside shards say something about them
        del held["jsonl"], held[ParquetImages.kind]
    found = {_by_content(tree, kind, some[0].path, options): len(some) for kind, some in held.items() if some}
    if not found:  # these two stand for themselves only: beside other files, they are notes on them
        found = {
            kind: len(some)
            for kind, endings in ((Text.kind, ("txt",)), (ImageText.kind, ("csv", "tsv")))
            if (some := [f for f in files if f.extension in endings])
        }
    if len(found) > 1:
        what = " and ".join(f"{n} files for {kind}" for kind, n in found.items())
        choices = " or ".join(f"--kind {kind}" for kind in found)
        raise DataError(f"{tree.url}: holds {what}; write {choices}")
    if not found:
        names = Counter(f".{f.extension}" if f.extension else "no extension" for f in files)
        endings = ", ".join(name for name, _ in names.most_common(5))
        raise DataError(
            f"{tree.url}: holds no source of shards (its files have {endings}); those are images, videos, "
            ".jsonl, .txt, .parquet, .tar, and .csv or .tsv lists of image and text"
        )
    return next(iter(found))


def _by_content(tree: Tree, kind: str, path: str, options: Options) -> str:
    if kind == "jsonl":
        try:
            with tree.open(path) as file:
                row, _ = json_row(file.readline())
        except OSError:
            return Text.kind
        return ImageText.kind if options.image_field or names_images(row) else Text.kind
    if kind == ParquetImages.kind:
        try:
            with Table(tree, path) as table:
                return kind if options.image_field or table.image_columns() else Text.kind
        except DataError:
            if len([f for f in tree.files if f.extension == "parquet"]) == 1:
                raise
    return kind
