"""Read some rows of an image that is too large to be decoded as a whole: of a .npy array or of a TIFF, such as a slide
of pathology or a scene of a satellite. Other images are decoded as a whole.

    with open_rows(file, "svs") as image:
        image.shape                    (height, width, channels)
        image.read(2560, 256)          the rows 2,560 to 2,815: [256, width, channels], the numbers as stored
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.array_images import ArrayHeader, read_array_header
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.image_formats import ARRAY, MAX_PIXELS, WrongChannels, errors_as_damage
from data_pipeline.formats.pixels import top_level
from data_pipeline.formats.tiff_images import COLOR_AXES, INVERTED, PALETTE, check_dtype, check_pages, import_tifffile

SLIDES = ("svs", "ndpi", "scn", "btf")  # extensions of TIFFs by the scanners and programs that write them
TIFFS = ("tif", "tiff", *SLIDES)
MAX_BANDS = 4  # times `max_pixels` are the numbers that are decoded at a time
_MAX_ARRAY_HEADER = 1 << 16  # bytes of the header of a .npy file


class ImageRows(Protocol):
    """An open image."""

    shape: tuple[int, int, int]
    dtype: np.dtype

    def read(self, top: int, count: int) -> np.ndarray:
        """`count` rows from row `top` on, [count, width, channels]. Raises `Damaged`."""


@contextmanager
def open_rows(
    file: IO[bytes], extension: str, as_stored: bool = False, max_pixels: int = MAX_PIXELS, level: int = 0
) -> Iterator[ImageRows]:
    """Open an image. `as_stored`: do not apply an EXIF orientation. `max_pixels`: of an image, or of a part of a TIFF,
    that has to be decoded as a whole. `level`: of a pyramid; 0 is the largest one. Raises `Damaged`."""
    if level and extension not in TIFFS:
        raise Damaged(f"is a .{extension} file, which has no level {level}")
    if extension == ARRAY:
        yield _ArrayRows(file, read_array_header(file.read(_MAX_ARRAY_HEADER)))
        return
    if extension in TIFFS:
        tifffile = import_tifffile()
        if tifffile is None and extension in SLIDES:
            raise Damaged(f"is a .{extension} file, which `pip install 'unlabeled[tiff]'` makes readable")
        if tifffile is not None:
            check_pages(file)
            with errors_as_damage():
                opened = tifffile.TiffFile(file, name="image.tif")  # the name of an open file may be a number
            with opened:
                with errors_as_damage():
                    is_palette = opened.pages[0].photometric == PALETTE
                if not is_palette:
                    yield _TiffRows(opened, as_stored, level, MAX_BANDS * max_pixels)
                    return
            file.seek(0)
        if level:
            raise Damaged(f"is decoded as a whole (a palette, or tifffile is missing), so that it has no level {level}")
    yield _WholeImage(file.read(), extension, as_stored, max_pixels)


class _ArrayRows:
    def __init__(self, file: IO[bytes], header: ArrayHeader):
        if header.order == "F":
            raise Damaged(".npy is stored column by column; store it again with numpy.ascontiguousarray")
        self.file, self.start, self.shape, self.dtype = file, header.start, header.shape, header.dtype

    def read(self, top: int, count: int) -> np.ndarray:
        _, width, channels = self.shape
        row_bytes = width * channels * self.dtype.itemsize
        self.file.seek(self.start + top * row_bytes)
        data = self.file.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise Damaged(f".npy is cut off in the rows {top} to {top + count - 1}")
        return np.frombuffer(data, self.dtype).reshape(count, width, channels)


class _TiffRows:
    """Decodes the tiles or strips that hold the rows, of one level of a pyramid. Of strips without compression, which may
    be as large as the image, only the rows are read."""

    def __init__(self, opened: Any, as_stored: bool, level: int, max_numbers: int):
        with errors_as_damage():
            levels = opened.series[0].levels
        if level >= len(levels):
            raise Damaged(f"has the levels 0 to {len(levels) - 1}, but level {level} is requested")
        with errors_as_damage():
            series = levels[level]
            self.pages: list[Any] = list(series.pages)
            page, axes, shape = self.pages[0], series.axes, tuple(series.shape)
            turned = int(page.tags[274].value) if 274 in page.tags else 1
            self.inverted = page.photometric == INVERTED
            self.file = opened.filehandle
            self.is_plain = page.compression == 1 and not page.is_tiled and page.bitspersample % 8 == 0
            largest = math.prod(page.chunks)  # numbers of a strip or tile
            self.stored_dtype = np.dtype(page.dtype).newbyteorder(opened.byteorder)
        check_dtype(page.dtype)
        if axes not in COLOR_AXES:
            raise Damaged(
                f"is a TIFF with the axes {axes} {list(shape)}, but one image is read, of the axes {', '.join(COLOR_AXES)}"
            )
        if turned > 1 and not as_stored:
            raise Damaged(f"has the orientation {turned}; write --as-stored to read it as it is stored")
        if largest > max_numbers and not self.is_plain:
            raise Damaged(
                f"is a TIFF with strips or tiles of {largest} numbers, but at most {max_numbers} are decoded at a time; store"
                " it in smaller ones, or write a larger --max-pixels"
            )
        self.shape = COLOR_AXES[axes](shape)
        self.dtype = np.dtype(page.dtype)

    def read(self, top: int, count: int) -> np.ndarray:
        height, width, channels = self.shape
        out = np.zeros((count, width, channels), self.dtype)  # parts that the file leaves out are 0
        for number, page in enumerate(self.pages):
            of_page = out[..., number : number + 1] if len(self.pages) > 1 else out
            with errors_as_damage():
                high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
                high, across = min(high, height), math.ceil(width / wide)
                of_plane = math.ceil(height / high) * across  # segments of a plane
                planes = len(page.dataoffsets) // of_plane
            if not planes:
                raise Damaged(
                    f"is a TIFF that is cut off: it has {len(page.dataoffsets)} of {of_plane} strips or tiles"
                )
            copy = self._copy_rows if self.is_plain else self._copy
            for plane in range(planes):
                of_plane_rows = of_page[..., plane : plane + 1] if planes > 1 else of_page
                for n in range(top // high * across, math.ceil((top + count) / high) * across):
                    copy(page, plane * of_plane + n, n // across * high, high, top, of_plane_rows)
        return top_level(self.dtype) - out if self.inverted and self.dtype.kind == "u" else out

    def _copy_rows(self, page: Any, number: int, y: int, high: int, top: int, out: np.ndarray) -> None:
        """Copy the rows of strip `number` of a page, which begins with row `y` and has `high` rows, to `out`, which begins
        with row `top`."""
        first, last = max(y, top), min(y + high, top + len(out), self.shape[0])
        row_bytes = out.shape[1] * out.shape[2] * self.dtype.itemsize
        with errors_as_damage():
            if not page.databytecounts[number]:
                return
            self.file.seek(page.dataoffsets[number] + (first - y) * row_bytes)
            data = self.file.read((last - first) * row_bytes)
        if len(data) != (last - first) * row_bytes:
            raise Damaged(f"is a TIFF that is cut off in the rows from {top} on")
        out[first - top : last - top] = np.frombuffer(data, self.stored_dtype).reshape(last - first, *out.shape[1:])

    def _copy(self, page: Any, number: int, y: int, high: int, top: int, out: np.ndarray) -> None:
        """The same for a strip or tile that is decoded as a whole."""
        with errors_as_damage():
            start, size = page.dataoffsets[number], page.databytecounts[number]
            if not size:
                return
            self.file.seek(start)
            data = self.file.read(size)
            decoded, (_, _, _, x, _), (_, high, wide, _) = page.decode(data, number, jpegtables=page.jpegtables)
        if len(data) != size or decoded is None:
            raise Damaged(f"is a TIFF that is cut off in the rows from {top} on")
        first, last, right = max(y, top), min(y + high, top + len(out)), min(x + wide, out.shape[1])
        if first < last:  # the last tile of a row may be wider than what is left of it
            out[first - top : last - top, x:right] = decoded[0, first - y : last - y, : right - x]


class _WholeImage:
    def __init__(self, data: bytes, extension: str, as_stored: bool, max_pixels: int):
        image = Encoded(data, extension, 3, 16, as_stored, max_pixels)
        image.dtype = image.stored_dtype
        try:
            self.pixels = image.pixels()
        except WrongChannels as error:
            image.channels = error.stored
            self.pixels = image.pixels()
        self.shape, self.dtype = self.pixels.shape, self.pixels.dtype

    def read(self, top: int, count: int) -> np.ndarray:
        return self.pixels[top : top + count]
