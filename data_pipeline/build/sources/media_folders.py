"""Sources that are folders of images, of arrays or of videos. Each file becomes a sample; its label is its sub-folder of
the first level, or comes from a list, whose other columns become fields of the .json member. Masks and depth maps
beside an image are members of its sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from common.errors import Damaged, DataError
from data_pipeline.build.sources.source import (
    IMAGE_OPTIONS,
    Block,
    Entry,
    Source,
    class_order,
    member_of,
    refuse_splits,
    stem,
    to_json,
)
from data_pipeline.build.sources.source_files import File, extension, reason_of
from data_pipeline.build.sources.tables import Labels
from data_pipeline.formats.av_files import need_av
from data_pipeline.formats.image_formats import ARRAY, IMAGES
from data_pipeline.formats.pixel_maps import MASKS, read_map
from data_pipeline.formats.videos import video_facts
from data_pipeline.shards.members import VIDEOS

# Endings of maps of numbers that belong to the image NAME beside NAME.ENDING, for segmentation and depth.
MAPS = (*MASKS, "depth.png", "depth.npy")


def map_ending(path: str) -> str:
    """The one of MAPS that a path ends in; "" for other paths."""
    return next((ending for ending in MAPS if path.lower().endswith(f".{ending}")), "")


class Images(Source):
    """A folder of images. Pieces: [path, what `_stated` returns for it, paths of its maps …]."""

    kind = "images"
    title = "folder of images"
    reads: tuple[str, ...] = ("labels", "label_field", *IMAGE_OPTIONS)
    overhead = 3072
    has_maps = True  # whether NAME.mask.png beside NAME.jpg is a member of this sample, as other `MAPS` are

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in IMAGES

    @cached_property
    def maps(self) -> dict[str, list[File]]:
        """{path of an image: the masks and depth maps that lie beside it}."""
        if not self.has_maps:
            return {}
        images = {
            f.path.rpartition(".")[0]: f.path for f in self.tree.files if self.takes(f) and not map_ending(f.path)
        }
        found = dict[str, list[File]]()
        for file in self.tree.files:
            ending = map_ending(file.path)
            if ending and (image := images.get(file.path[: -len(ending) - 1])):
                found.setdefault(image, []).append(file)
        return found

    @cached_property
    def files(self) -> list[File]:
        maps = {*self.extra_files()}
        return [file for file in self.tree.files if self.takes(file) and file not in maps]

    def extra_files(self) -> list[File]:
        return [file for files in self.maps.values() for file in files]

    def other_files(self) -> list[File]:
        maps = {*self.extra_files()}
        return [file for file in super().other_files() if file not in maps]

    def begin(self) -> None:
        if self.maps:
            endings = sorted({map_ending(file.path) for file in self.extra_files()})
            self.options = replace(self.options, further=endings)
            self.notes.append(f"{len(self.maps)} images have {', '.join(f'.{e}' for e in endings)} beside them")
        self._labels: dict[str, str] = {}
        self._fields: dict[str, dict[str, Any]] = {}
        if self.options.label_field and not self.options.labels:
            raise DataError("--label-field names a column of --labels FILE, which is not given")
        if self.options.labels:
            self._label_from_list(Labels(self.options.labels, self.options.label_field))
        else:
            self._labels = {f.path: f.path.partition("/")[0] for f in self.files if "/" in f.path}
            refuse_splits(self._labels.values(), self.tree)
        self.classes = class_order(set(self._labels.values()))

    def _label_from_list(self, labels: Labels) -> None:
        """Set the labels of the files that a list names. Raises DataError if it names none, or one ambiguously."""
        not_found = set(labels.by_path)
        unlabelled = []
        folders = dict[str, str]()  # {name in the list that has no folder: folder of its file}
        for file in self.files:
            found = labels.of(file.path)
            folder = file.path.rpartition("/")[0]
            if found and "/" not in found[0] and folders.setdefault(found[0], folder) != folder:
                raise DataError(
                    f"{labels.name}: names {found[0]}, but {file.path} and one in"
                    f" {folders[found[0]] or 'the source itself'} are both files with this name; write paths below the"
                    " source"
                )
            if found is None:
                unlabelled.append(file.path)
            else:
                not_found.discard(found[0])
                self._labels[file.path] = found[1]
                self._fields[file.path] = labels.fields[found[0]]
        self.bad += [(path, f"is listed in {labels.name}, but does not exist") for path in sorted(not_found)]
        if unlabelled:
            some = ", ".join(unlabelled[:5]) + (", …" if len(unlabelled) > 5 else "")
            self.notes.append(f"{len(unlabelled)} files have no row in {labels.name} and get no label: {some}")
        if not self._labels:
            example = next(iter(labels.by_path))
            raise DataError(
                f"{labels.name}: names none of the {len(self.files)} files, for example {self.files[0].path};"
                f" its own names are like {example}. Write paths below the source"
            )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def _stated(self, path: str) -> list[Any]:
        """[class number or None, fields of its row in a list]: what is stated about a file, for its pieces."""
        label = self._labels.get(path)
        return [None if label is None else self._numbers[label], self._fields.get(path, {})]

    def blocks(self, surveys: dict[str, dict[str, Any]]) -> Iterator[Block]:
        """A file is one block, or those of its survey. What is stated about it, and the paths of its maps, are added to
        their pieces."""
        for file in self.files:
            maps = self.maps.get(file.path, [])
            whole = [sum(each.size + self.overhead for each in (file, *maps)), 1, [file.path]]
            for size, rows, piece in surveys.get(file.path, {"blocks": [whole]})["blocks"]:
                yield Block(size, rows, [*piece, self._stated(file.path), *(each.path for each in maps)])

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path, stated, *maps = piece
        try:
            data = self.tree.read(path)
            members = {member_of(extension(path)): data, **annotated(stated, {"path": path, **self.annotation(data)})}
            for each in maps:
                ending = map_ending(each)
                members[ending] = self.tree.read(each)
                read_map(members[ending], ending)
        except (OSError, Damaged) as error:
            yield Entry(path, reason=reason_of(error))
            return
        yield Entry(path, stem(path), members)

    def annotation(self, data: bytes) -> dict[str, Any]:
        """Further entries for the json member of a file."""
        return {}


def annotated(stated: list[Any], facts: dict[str, Any]) -> dict[str, bytes]:
    """The .json member, and the .cls member if there is a label. `stated`: [class number or None, fields of a list];
    `facts`: what the build knows, which replaces fields of the same name."""
    label, fields = stated
    return {"json": to_json(fields | facts)} | ({} if label is None else {"cls": str(label).encode()})


class Arrays(Images):
    """A folder of images as .npy arrays, such as those of many channels. Arrays beside images are annotations of these."""

    kind = "arrays"
    title = "folder of .npy arrays"

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension == ARRAY


class Videos(Images):
    """A folder of videos. Pieces: [path, what `_stated` returns for it]."""

    kind = "videos"
    title = "folder of videos"
    reads = ("labels", "label_field")
    has_maps = False

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in VIDEOS

    def begin(self) -> None:
        need_av()
        super().begin()

    def annotation(self, data: bytes) -> dict[str, Any]:
        try:
            return video_facts(data)
        except Damaged:
            return {}  # the check of the sample reports the damage
