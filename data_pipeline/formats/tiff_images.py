"""TIFFs that Pillow does not read faithfully: of bands that are neither colours nor transparency, of signed or float
numbers, and of 16-bit colours. They are read with tifffile, which `pip install 'unlabeled[tiff]'` installs. All other
TIFFs are left to Pillow.

tifffile follows damaged files further than is safe: it reads a chain of pages that ends in a loop for ever, and fills
strips and tiles that are missing with zeros. `read_tiff_header` refuses such files first.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
from collections.abc import Callable
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.image_formats import WrongChannels, errors_as_damage
from data_pipeline.formats.pixels import FLOATS, PixelDtype, converted, on_white, top_level, with_channels

MAX_PAGES = 4096  # of a file: channels, smaller copies and masks
MAX_TAGS = 4096  # of a page
PALETTE, INVERTED = 3, 0  # numbers of PhotometricInterpretation
# {axes of an image: its shape as [H, W, C]}; S: samples of a pixel, C: pages
COLOR_AXES: dict[str, Callable[[tuple[int, ...]], tuple[int, int, int]]] = {
    "YX": lambda shape: (shape[0], shape[1], 1),
    "YXS": lambda shape: (shape[0], shape[1], shape[2]),
    "SYX": lambda shape: (shape[1], shape[2], shape[0]),
    "CYX": lambda shape: (shape[1], shape[2], shape[0]),
}
_BANDS = {0: 1, 1: 1, 2: 3}  # PhotometricInterpretation of grey (0, 1) and RGB (2) → bands that hold colours
# Numbers of compressions that Pillow does not read: JPEG 2000 of Aperio and of GDAL, JPEG XR, LERC, PNG, WebP, JPEG XL
_WITHOUT_PILLOW = (33003, 33004, 33005, 34712, 22610, 34934, 34887, 34933, 50001, 34927, 50002, 52546)
_ALPHA = {(1,): "premultiplied", (2,): "plain"}  # ExtraSamples of one band of transparency


class TiffHeader(NamedTuple):
    """What the header of a TIFF states of its image."""

    shape: tuple[int, int, int]  # [H, W, C]
    dtype: np.dtype
    bits: int  # of a number
    orientation: int  # as in EXIF
    inverted: bool  # 0 is white
    alpha: str  # "plain" or "premultiplied" if the last channel is transparency; "" without
    numbers: int  # in the decoded image, or in one of its strips or tiles, if that is more


def read_tiff_header(data: bytes) -> TiffHeader | None:
    """The header of a TIFF; None if Pillow reads it, or if tifffile is not installed. Raises `Damaged`."""
    tifffile = import_tifffile()
    if tifffile is None:
        return None
    check_pages(io.BytesIO(data))
    with errors_as_damage(), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        bands, dtype, bits, kind = page.samplesperpixel, page.dtype, page.bitspersample, page.photometric
        by_channels = len(file.pages) > 1 and file.series[0].axes == "CYX"
        unsigned = dtype is not None and dtype.kind in "ub"
        extra = tuple(map(int, page.extrasamples))
        alpha = _ALPHA.get(extra, "") if bands == _BANDS.get(kind, bands) + 1 else ""
        named = bands == _BANDS.get(kind, bands) or alpha or (bands, extra) == (4, ())  # Pillow refuses the last
        gray = bands == 1 and bits <= 16
        compressed = kind in _BANDS and page.compression in _WITHOUT_PILLOW
        few = kind == PALETTE or gray or (bits <= 8 and bands <= 4 and named)
        if unsigned and few and not by_channels and not compressed:
            return None
        series, *others = file.series
        shape, axes = tuple(series.shape), series.axes
        is_complete = all(each is not None for each in series.pages)
        pages = list(series.pages) if is_complete else []
        segments = [s for p in pages for s in zip(p.dataoffsets, p.databytecounts, strict=True)]
        expected = sum(math.prod(p.chunked) for p in pages)
        largest = math.prod(page.chunks)  # numbers of a strip or of a tile, which may be larger than the image
        has_others = any(not each.keyframe.subfiletype & 5 for each in others)  # neither smaller copies nor masks
        header_tags = page.tags
        turned = int(header_tags[274].value) if 274 in header_tags else 1
    check_dtype(dtype)
    if axes not in COLOR_AXES:
        raise Damaged(
            f"is a TIFF with the axes {axes} {list(shape)}, but one image is read, of the axes {', '.join(COLOR_AXES)};"
            " write each image to a file of its own"
        )
    if has_others:
        raise Damaged("is a TIFF of several pages; write each page to a file of its own, or channels of one size to it")
    if not is_complete:
        raise Damaged(f"is a TIFF that states the axes {axes} {list(shape)}, but some of its pages are not in the file")
    if len(segments) < expected:
        raise Damaged(f"is a TIFF whose pixels are cut off: it has {len(segments)} of {expected} strips or tiles")
    if any(not size or start + size > len(data) for start, size in segments):
        raise Damaged(f"is a TIFF whose pixels are cut off: it has {len(data)} bytes")
    shape = COLOR_AXES[axes](shape)
    numbers = max(math.prod(shape), largest)
    return TiffHeader(shape, np.dtype(dtype), bits, turned, kind == INVERTED, alpha, numbers)


def check_dtype(dtype: Any) -> None:
    """Raise `Damaged` for a dtype of numbers that is not read; None: one that numpy does not have."""
    if dtype is None or dtype.name not in ("uint8", "uint16", *FLOATS):
        raise Damaged(f"is a TIFF of {dtype} numbers, but uint8, uint16, {', '.join(FLOATS)} are read")


def tiff_pixels(data: bytes, header: TiffHeader, channels: int, bits: int, dtype: PixelDtype) -> np.ndarray:
    """The pixels of a TIFF as stored, `dtype` [H, W, channels]; see `Encoded` for `channels`, `bits` and `dtype`."""
    count = header.shape[2]
    blends = bool(header.alpha) and header.dtype.kind == "u" and channels in (1, 3) and count != channels
    if count != channels and not blends and (count, channels) not in ((1, 3), (3, 1)):
        raise WrongChannels(count, channels)
    with errors_as_damage(), import_tifffile().TiffFile(io.BytesIO(data)) as file:
        stored = file.series[0].asarray(maxworkers=1)
        axes = file.series[0].axes
    if stored.size != math.prod(header.shape):
        raise Damaged(f"is a TIFF of {stored.size} numbers, but its header states {list(header.shape)}")
    stored = stored[..., None] if axes == "YX" else stored if axes == "YXS" else np.moveaxis(stored, 0, 2)
    bits = min(bits, header.bits)
    if blends:
        if stored.dtype == np.uint8:
            stored, bits = converted(stored, 8, "uint16"), 16
        stored = on_white(stored, bits, header.alpha == "premultiplied")
    pixels = converted(stored, bits, dtype)
    if header.inverted and header.dtype.kind == "u":
        pixels = np.asarray(top_level(dtype), dtype) - pixels
    return pixels if pixels.shape[2] == channels else with_channels(pixels, channels)


def check_pages(file: IO[bytes]) -> None:
    """Raise `Damaged` if the directories of the pages form a loop, or if there are more than MAX_PAGES of them. The file
    is at its beginning afterwards."""
    file.seek(0)
    start = file.read(16)
    order: Literal["little", "big"] = "little" if start.startswith(b"II") else "big"
    width, count_width, entry = (8, 8, 20) if 43 in start[2:4] else (4, 2, 12)  # BigTIFF or TIFF
    offset = int.from_bytes(start[width : 2 * width], order)
    seen = set[int]()
    while 0 < offset < 1 << 63:
        if offset in seen:
            raise Damaged("is a TIFF whose pages form a loop")
        if len(seen) == MAX_PAGES:
            raise Damaged(f"is a TIFF of more than {MAX_PAGES} pages")
        seen.add(offset)
        file.seek(offset)
        count = int.from_bytes(file.read(count_width), order)
        if count > MAX_TAGS:  # tifffile ends the chain there, too
            break
        file.seek(offset + count_width + entry * count)
        offset = int.from_bytes(file.read(width), order)
    file.seek(0)


@functools.cache
def import_tifffile() -> Any:
    """The module tifffile; None if it is not installed."""
    try:
        module = importlib.import_module("tifffile")
    except ImportError:
        return None
    module.logger().setLevel("CRITICAL")  # it warns of damaged metadata, which are not used
    return module
