"""A source of DICOM and NIfTI files, whose frames and axial slices become images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from common.errors import Damaged, DataError
from common.untrusted import is_number
from data_pipeline.build.sources.image_tiles import encoded
from data_pipeline.build.sources.media_folders import Images, annotated
from data_pipeline.build.sources.source import Entry, Options, stem
from data_pipeline.build.sources.source_files import READ_ERRORS, File, reason_of
from data_pipeline.formats.medical_images import NIFTI, Window, check_fields, need, open_slices

DICOM = ("dcm", "dicom", "ima")
BYTES_PER_NUMBER = 2  # approximately, in a shard


def check_window(options: Options) -> None:
    """Raise DataError if `window` is not a range of numbers."""
    if options.window:
        parse_window(options.window)


def parse_window(text: str) -> Window:
    """The (lowest, highest) number that "LOW,HIGH" states. Raises DataError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not (math.isfinite(high - low) and low < high):
        raise DataError(f"--window {text}: write the lowest and the highest number, for example --window=-1000,400")
    return low, high


class MedicalSlices(Images):
    """Frames of DICOM files and axial slices of NIfTI volumes. Pieces: [path, first slice, number of slices, what
    `_stated` returns]."""

    kind = "slices"
    title = "folder of DICOM or NIfTI files"
    reads = ("labels", "label_field", "max_pixels", "window", "dicom_fields")
    has_maps = False

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in DICOM or file.path.lower().endswith(NIFTI)

    @cached_property
    def files(self) -> list[File]:
        """With `--kind slices` also files without an ending, or with a number, as DICOM archives name them."""
        return [file for file in self.tree.files if self.takes(file) or (self.kind_given and _may_be_dicom(file))]

    @property
    def _keywords(self) -> list[str]:
        return [name for name in self.options.dicom_fields.split(",") if name]

    def begin(self) -> None:
        if any(not file.path.lower().endswith(NIFTI) for file in self.files):
            need("pydicom")
            need("imagecodecs")
        if any(file.path.lower().endswith(NIFTI) for file in self.files):
            need("nibabel")
        if self._keywords:
            check_fields(self._keywords)
        super().begin()
        if self.options.window:
            low, high = parse_window(self.options.window)
            self.notes.append(f"numbers from {low:g} to {high:g} become levels of grey; others are cut off")

    def files_to_survey(self) -> list[str]:
        return [file.path for file in self.files]

    def survey(self, path: str) -> dict[str, Any]:
        """Divide the slices of a file into blocks; see `Source.survey`."""
        try:
            with self._open(path) as image:
                count, numbers = image.count, math.prod(image.shape)
        except (Damaged, *READ_ERRORS) as reason:
            return {"blocks": [], "bad": [[path, reason_of(reason)]]}
        slice_bytes = numbers * BYTES_PER_NUMBER + self.overhead
        per_block, blocks = max(1, self.limit // slice_bytes), []
        for first in range(0, count, per_block):
            part = min(per_block, count - first)
            blocks.append([part * slice_bytes, part, [path, first, part]])
        return {"blocks": blocks, "bad": []}

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path, first, count, stated = piece
        done = 0
        try:
            with self._open(path) as image:
                fields = image.fields(self._keywords)
                for number, pixels in enumerate(image.read(first, count), first):
                    place = {"slice": number} if image.count > 1 else {}
                    ending, data = encoded(pixels, None)
                    members = {ending: data, **annotated(stated, {"path": path, **place, **fields})}
                    yield Entry(f"{path} slice {number}", f"{stem(path)}-{number:04d}", members)
                    done += 1
        except (Damaged, *READ_ERRORS) as reason:
            yield Entry(path, reason=f"{count - done} of {count} slices are left out: {reason_of(reason)}")
            yield from [None] * (count - done - 1)

    @contextmanager
    def _open(self, path: str) -> Iterator[Any]:
        window = parse_window(self.options.window) if self.options.window else None
        with self.tree.open(path) as file:
            yield open_slices(file, path, self.tree.stat(path).size, self.options.max_pixels, window)


def _may_be_dicom(file: File) -> bool:
    return (not file.extension or is_number(file.extension)) and file.path.rpartition("/")[2] != "DICOMDIR"
