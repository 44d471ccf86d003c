"""The kinds of sources that shards are built from, and the detection of the kind of a path."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from common.errors import DataError, nearest
from data_pipeline.build.sources.frame_folders import FrameFolders, check_fps
from data_pipeline.build.sources.image_tiles import Tiles, check_tile
from data_pipeline.build.sources.media_folders import Arrays, Images, Videos
from data_pipeline.build.sources.medical_slices import MedicalSlices, check_window
from data_pipeline.build.sources.parquet import ParquetImages, Table
from data_pipeline.build.sources.recordings import Recordings, check_seconds, names_recordings
from data_pipeline.build.sources.source import Options, Source, check_bits, check_max_pixels
from data_pipeline.build.sources.source_files import Tree
from data_pipeline.build.sources.tables import ImageText, json_row, names_images, read_rows
from data_pipeline.build.sources.tars import Tars, TarSubset
from data_pipeline.build.sources.text_files import CONVERT, Text
from data_pipeline.build.sources.video_frames import Frames, check_every
from data_pipeline.formats.image_formats import ARRAY
from data_pipeline.formats.row_reader import SLIDES
from data_pipeline.shards.members import MAX_MEMBER_BYTES
from data_pipeline.storage.urls import compressed_tar_hint

KINDS: dict[str, type[Source]] = {
    k.kind: k
    for k in (
        Images,
        Arrays,
        Tiles,
        MedicalSlices,
        Videos,
        Frames,
        FrameFolders,
        Recordings,
        Text,
        ImageText,
        ParquetImages,
        Tars,
    )
}
_ALL_KINDS = {**KINDS, TarSubset.kind: TarSubset}  # with the one that only `shards split` uses


def open_source(kind: str, url: str, options: Options, limit: int, classes: list[str] | None = None) -> Source:
    """Open a source of a known kind, in a worker process."""
    return _ALL_KINDS[kind](Tree(url), options, limit, classes)


def find_source(kind: str, url: str, options: Options, limit: int) -> Source:
    """Open the source at a path. `kind`: "" to detect it. Raises DataError."""
    if kind and kind not in _ALL_KINDS:
        raise DataError(f"--kind {kind}: no such kind of source; {nearest(kind, KINDS)}")
    check_bits(options.bits)
    check_max_pixels(options.max_pixels)
    check_every(options)
    check_fps(options)
    check_seconds(options)
    check_tile(options)
    check_window(options)
    tree, kind_given = Tree(url), bool(kind)
    if kind in ("", Images.kind) and (options.frames_every is not None or (kind and _only_videos(tree))):
        kind = Frames.kind
    if not kind and options.tile is not None:
        kind = Tiles.kind
    if not kind and options.fps is not None:
        kind = FrameFolders.kind
    source = _ALL_KINDS[kind or detect(tree, options)](tree, options, limit)
    source.kind_given = kind_given
    for field in fields(Options):
        has_effect = field.name in (*source.reads, "low", "high", "further")
        if not has_effect and getattr(options, field.name) != field.default:
            readers = ", ".join(k.kind for k in KINDS.values() if field.name in k.reads)
            flag = "--" + field.name.replace("_", "-")
            raise DataError(f"{flag} has no effect on a {source.title}, only on sources of the kinds {readers}")
    if not source.files:
        files_of = Counter(file.extension or "no extension" for file in tree.files)
        listed = ", ".join(f"{n} .{e}" for e, n in files_of.most_common(5)) or "nothing"
        hint = compressed_tar_hint(tree.files[0].path) if tree.files else ""
        raise DataError(f"{url}: holds nothing for a {source.title}; it holds {listed}{hint}")
    return source


def _only_videos(tree: Tree) -> bool:
    """Whether a source holds videos and no images. `--kind images` means frames of the videos then."""
    return any(Videos.takes(file) for file in tree.files) and not any(Images.takes(file) for file in tree.files)


def detect(tree: Tree, options: Options) -> str:
    """Detect the kind of a source by the names of its files, and, for tables, by their columns.

    Raises DataError if none or several kinds fit.
    """
    files = tree.files
    if not files:
        raise DataError(f"{tree.url}: is an empty folder")
    files_of = {
        kind.kind: [f for f in files if kind.takes(f)]
        for kind in (Images, MedicalSlices, Videos, Recordings, ParquetImages, Tars)
    }
    files_of["jsonl"] = [f for f in files if f.extension == "jsonl"]
    if files_of[Tars.kind]:  # tables beside shards are annotations of them
        del files_of["jsonl"], files_of[ParquetImages.kind]
    found = {_by_content(tree, kind, some[0].path, options): len(some) for kind, some in files_of.items() if some}
    if not found:  # beside other files, these would be annotations
        found = {
            kind: len(some)
            for kind, endings in (
                (Arrays.kind, (ARRAY,)),
                (Text.kind, ("txt",)),
                (ImageText.kind, ("csv", "tsv")),
            )
            if (some := [f for f in files if f.extension in endings])
        }
        if Arrays.kind in found:
            found = {Arrays.kind: found[Arrays.kind]}
    if tree.single_file and files[0].extension in ("csv", "tsv"):
        _, first_row = next(read_rows(tree, files[0].path), (0, {}))
        found = {Recordings.kind: 1} if names_recordings(first_row) else found
    if not found and (lists := [f for f in files if f.extension == "json"]):
        _, first_row = next(read_rows(tree, lists[0].path), (0, {}))
        found = {ImageText.kind if names_images(first_row) else Text.kind: len(lists)}
    if len(found) > 1:
        what = " and ".join(f"{n} files for {kind}" for kind, n in found.items())
        choices = " or ".join(f"--kind {kind}" for kind in found)
        raise DataError(f"{tree.url}: holds {what}; write {choices}")
    if not found:
        names = Counter(f".{f.extension}" if f.extension else "no extension" for f in files)
        endings = ", ".join(name for name, _ in names.most_common(5))
        if slides := [file for file in files if file.extension in SLIDES]:
            raise DataError(f"{tree.url}: holds {len(slides)} slides; --tile 256 cuts them into tiles of 256 pixels")
        for file in files:
            kind, path = file.path.lower().removesuffix(".gz").rpartition(".")[2], tree.full_path(file.path)
            if kind in ("arrow", "wet"):
                command = CONVERT[kind].format(path=path)
                if file.extension == "gz":
                    command = f"zcat {path} | {command.replace(f' < {path}', '')}"
                raise DataError(f"{tree.url}: holds .{kind} files, which this command converts to text: {command}")
        raise DataError(
            f"{tree.url}: holds no source of shards (its files have {endings}); those are images, .npy arrays,"
            " DICOM, NIfTI, videos, recordings, .jsonl, .json, .txt, .parquet, .tar, and .csv or .tsv lists of image and"
            " text; --kind text takes any text file"
            f"{compressed_tar_hint(files[0].path)}"
        )
    return next(iter(found))


def _by_content(tree: Tree, kind: str, path: str, options: Options) -> str:
    """The kind of the files of which `path` is the first: for tables, it depends on their columns."""
    if kind == "jsonl":
        try:
            with tree.open(path) as file:
                row, _ = json_row(file.readline(MAX_MEMBER_BYTES))
        except OSError:
            return Text.kind
        if tree.single_file and names_recordings(row):
            return Recordings.kind
        return ImageText.kind if options.image_field or names_images(row) else Text.kind
    if kind == ParquetImages.kind:
        try:
            with Table(tree, path) as table:
                return kind if options.image_field or table.holds_images() else Text.kind
        except DataError:
            if len([f for f in tree.files if f.extension == "parquet"]) == 1:
                raise
    return kind
