"""A source of images that are tiles of larger ones, such as slides of pathology or scenes of satellites: squares that lie
side by side, from the upper left corner on. What remains at the right and the lower edge is left out.

The survey reads the size of each image, and divides its rows of tiles into pieces. A worker decodes one row of tiles at a
time, so that its memory does not depend on the height of the image. Tiles keep the numbers of the image: they are stored
as PNG, or as .npy if PNG cannot hold their channels or numbers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from common.errors import Damaged, DataError
from data_pipeline.build.sources.media_folders import Images, annotated, map_ending
from data_pipeline.build.sources.source import IMAGE_OPTIONS, Entry, Options, stem
from data_pipeline.build.sources.source_files import READ_ERRORS, File, extension, reason_of
from data_pipeline.formats.image_formats import ARRAY, IMAGES
from data_pipeline.formats.pixel_maps import read_map
from data_pipeline.formats.pixels import top_level
from data_pipeline.formats.row_reader import MAX_BANDS, SLIDES, ImageRows, open_rows

MIN_SIDE = 16  # pixels of a tile


def check_tile(options: Options) -> None:
    """Raise DataError if an option for tiles has no valid value."""
    if options.tile is not None and options.tile < MIN_SIDE:
        raise DataError(f"--tile {options.tile}: write the side of a tile in pixels, at least {MIN_SIDE}")
    if options.tile_jpeg is not None and not 1 <= options.tile_jpeg <= 100:
        raise DataError(f"--tile-jpeg {options.tile_jpeg}: write a quality from 1 to 100")
    if not 0 <= options.tile_min_std < float("inf"):
        raise DataError(f"--tile-min-std {options.tile_min_std:g}: write a standard deviation, 0 or more")
    if options.tile_level < 0:
        raise DataError(f"--tile-level {options.tile_level}: write the number of a level; 0 is the largest one")
    if options.tile is None:
        for flag, value, default in (
            ("--tile-level", options.tile_level, 0),
            ("--tile-jpeg", options.tile_jpeg, None),
            ("--tile-min-std", options.tile_min_std, 0.0),
        ):
            if value != default:
                raise DataError(f"{flag} is an option of --tile SIDE, which is not given")


class Tiles(Images):
    """Tiles of images. Pieces: [path, first row of tiles, number of rows, what `_stated` returns, maps …]."""

    kind = "tiles"
    title = "folder of images that are cut into tiles"
    reads = ("labels", "label_field", *IMAGE_OPTIONS, "tile", "tile_level", "tile_min_std", "tile_jpeg")

    @classmethod
    def takes(cls, file: File) -> bool:
        return file.extension in (*IMAGES, *SLIDES, ARRAY)

    @cached_property
    def files(self) -> list[File]:
        """The images; beside images, arrays are annotations."""
        found = super().files
        images = [file for file in found if file.extension != ARRAY]
        return images or found

    @property
    def side(self) -> int:
        assert self.options.tile is not None
        return self.options.tile

    def begin(self) -> None:
        if self.options.tile is None:
            raise DataError("--kind tiles needs --tile SIDE, the side of a tile in pixels")
        super().begin()
        self.notes.append(
            f"each image is cut into tiles of {self.side}×{self.side} pixels; what remains at its right and lower edge is"
            " left out"
        )
        if self.options.tile_min_std:
            self.notes.append(f"tiles with a standard deviation below {self.options.tile_min_std:g} are left out")

    def files_to_survey(self) -> list[str]:
        return [file.path for file in self.files]

    def survey(self, path: str) -> dict[str, Any]:
        """Divide the rows of tiles of an image into blocks; see `Source.survey`."""
        try:
            with self._open(path) as image:
                (height, width, channels), itemsize = image.shape, image.dtype.itemsize
        except (Damaged, *READ_ERRORS) as reason:
            return {"blocks": [], "bad": [[path, reason_of(reason)]]}
        rows, columns = height // self.side, width // self.side
        if not rows * columns:
            too_small = f"has {width}×{height} pixels, less than a tile of {self.side}×{self.side}"
            return {"blocks": [], "bad": [[path, too_small]]}
        if self.side * width * channels > MAX_BANDS * self.options.max_pixels:
            too_wide = (
                f"has rows of {width} pixels and {channels} channels, too many for {self.side} rows at a time; write a larger"
                " --max-pixels"
            )
            return {"blocks": [], "bad": [[path, too_wide]]}
        row_bytes = columns * (self.side**2 * channels * itemsize + self.overhead)
        rows_per_block = max(1, self.limit // row_bytes)
        blocks = []
        for first in range(0, rows, rows_per_block):
            count = min(rows_per_block, rows - first)
            blocks.append([count * row_bytes, count * columns, [path, first, count]])
        return {"blocks": blocks, "bad": []}

    def entries(self, piece: list[Any]) -> Iterator[Entry | None]:
        path, first, count, stated, *maps = piece
        with self._open(path) as image:
            planes, failed = self._planes(maps, image.shape)
            for top in range(first * self.side, (first + count) * self.side, self.side):
                strip = np.empty(0)
                try:
                    strip = strip if failed else image.read(top, self.side)
                except (Damaged, *READ_ERRORS) as reason:
                    failed = reason_of(reason)
                for left in range(0, image.shape[1] - self.side + 1, self.side):
                    if failed:
                        yield Entry(f"{path} at {left},{top}", reason=failed)
                        continue
                    part = slice(left, left + self.side)
                    of_tile = {ending: plane[top : top + self.side, part] for ending, plane in planes.items()}
                    yield self._tile(path, strip[:, part], of_tile, (left, top), stated)

    def _planes(self, maps: list[str], shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], str]:
        """({ending: numbers [H, W]} of the masks and depth maps of an image of `shape`, why they cannot be used or "")."""
        planes = dict[str, np.ndarray]()
        for path in maps:
            ending = map_ending(path)
            try:
                planes[ending] = read_map(self.tree.read(path), ending)
            except (Damaged, *READ_ERRORS) as reason:
                return {}, f"its .{ending} {reason_of(reason)}"
            if planes[ending].shape != shape[:2]:
                height, width = planes[ending].shape
                return {}, f"its .{ending} has {width}×{height} pixels, but it has {shape[1]}×{shape[0]}"
        return planes, ""

    def _tile(
        self, path: str, pixels: np.ndarray, maps: dict[str, np.ndarray], place: tuple[int, int], stated: list[Any]
    ) -> Entry | None:
        """The sample of a tile; None for one that is left out."""
        if self.options.tile_min_std and _deviation(pixels) < self.options.tile_min_std:
            return None
        left, top = place
        ending, data = encoded(pixels, self.options.tile_jpeg)
        level = {"level": self.options.tile_level} if self.options.tile_level else {}
        members = {ending: data, **annotated(stated, {"path": path, "left": left, "top": top, **level})}
        for map_name, values in maps.items():
            members[map_name] = encoded_map(values, map_name)
        return Entry(f"{path} at {left},{top}", f"{stem(path)}-{left}-{top}", members)

    @contextmanager
    def _open(self, path: str) -> Iterator[ImageRows]:
        options = self.options
        with (
            self.tree.open(path) as file,
            open_rows(file, extension(path), options.as_stored, options.max_pixels, options.tile_level) as image,
        ):
            yield image


def encoded(pixels: np.ndarray, quality: int | None) -> tuple[str, bytes]:
    """(extension, bytes) of a tile [S, S, C]: PNG for grey and colours of 8 and 16 bits, JPEG for those of 8 bits if
    `quality` is given, and .npy for all others."""
    if pixels.shape[2] not in (1, 3) or pixels.dtype.kind != "u":
        return ARRAY, _npy(pixels)
    kind = "jpg" if quality is not None and pixels.dtype.itemsize == 1 else "png"
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if kind == "jpg" else []
    native = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("="), copy=False)[..., ::-1])  # BGR
    return kind, cv2.imencode(f".{kind}", native, options)[1].tobytes()


def encoded_map(values: np.ndarray, ending: str) -> bytes:
    """The bytes of the part of a mask or depth map [S, S] that belongs to a tile, in the format of the whole one."""
    if ending.endswith(ARRAY):
        return _npy(values)
    deep = values.max(initial=0) > 255 or ending.startswith("depth")
    return cv2.imencode(".png", np.ascontiguousarray(values.astype(np.uint16 if deep else np.uint8)))[1].tobytes()


def _npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(values))
    return out.getvalue()


def _deviation(pixels: np.ndarray) -> float:
    """The largest standard deviation of a channel; of unsigned numbers as a share of their range."""
    top = top_level(pixels.dtype.newbyteorder("=").name)
    return float(pixels.reshape(-1, pixels.shape[2]).std(0, dtype=np.float64).max()) / top
