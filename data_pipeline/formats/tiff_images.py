"""TIFFs that Pillow does not read faithfully: of more than four bands, of signed or float numbers, and of 16-bit colours.
They are read with tifffile, which `pip install 'unlabeled[tiff]'` installs. All other TIFFs are left to Pillow.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.image_formats import WrongChannels, errors_as_damage
from data_pipeline.formats.pixels import FLOATS, PixelDtype, converted, top_level, with_channels

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
PALETTE, INVERTED = 3, 0  # numbers of PhotometricInterpretation
# {axes of an image: its shape as [H, W, C]}; S: samples of a pixel, C: pages
COLOR_AXES: dict[str, Callable[[tuple[int, ...]], tuple[int, int, int]]] = {
    "YX": lambda shape: (shape[0], shape[1], 1),
    "YXS": lambda shape: (shape[0], shape[1], shape[2]),
    "SYX": lambda shape: (shape[1], shape[2], shape[0]),
    "CYX": lambda shape: (shape[1], shape[2], shape[0]),
}


class TiffHeader(NamedTuple):
    """What the header of a TIFF states of its image."""

    shape: tuple[int, int, int]  # [H, W, C]
    dtype: np.dtype
    bits: int  # of a number
    orientation: int  # as in EXIF
    inverted: bool  # 0 is white


def read_tiff_header(data: bytes) -> TiffHeader | None:
    """The header of a TIFF; None if Pillow reads it, or if tifffile is not installed. Raises `Damaged`."""
    tifffile = import_tifffile()
    if tifffile is None:
        return None
    with errors_as_damage(), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        bands, dtype, bits = page.samplesperpixel, page.dtype, page.bitspersample
        by_channels = len(file.pages) > 1 and file.series[0].axes == "CYX"
        unsigned = dtype is not None and dtype.kind in "ub"
        gray = bands == 1 and bits <= 16
        if unsigned and not by_channels and (page.photometric == PALETTE or gray or (bits <= 8 and bands <= 4)):
            return None
        series = file.series[0]
        shape, axes = tuple(series.shape), series.axes
        segments = [s for p in series.pages for s in zip(p.dataoffsets, p.databytecounts, strict=True)]
        header_tags = page.tags
        turned = int(header_tags[274].value) if 274 in header_tags else 1
        inverted = page.photometric == INVERTED
    check_dtype(dtype)
    if axes not in COLOR_AXES:
        raise Damaged(
            f"is a TIFF with the axes {axes} {list(shape)}, but one image is read, of the axes {', '.join(COLOR_AXES)};"
            " write each image to a file of its own"
        )
    if not segments or any(not size or start + size > len(data) for start, size in segments):
        raise Damaged(f"is a TIFF whose pixels are cut off: it has {len(data)} bytes")
    return TiffHeader(COLOR_AXES[axes](shape), np.dtype(dtype), bits, turned, inverted)


def check_dtype(dtype: Any) -> None:
    """Raise `Damaged` for a dtype of numbers that is not read; None: one that numpy does not have."""
    if dtype is None or dtype.name not in ("uint8", "uint16", *FLOATS):
        raise Damaged(f"is a TIFF of {dtype} numbers, but uint8, uint16, {', '.join(FLOATS)} are read")


def tiff_pixels(data: bytes, header: TiffHeader, channels: int, bits: int, dtype: PixelDtype) -> np.ndarray:
    """The pixels of a TIFF as stored, `dtype` [H, W, channels]; see `Encoded` for `channels`, `bits` and `dtype`."""
    count = header.shape[2]
    if count != channels and (count, channels) not in ((1, 3), (3, 1)):
        raise WrongChannels(count, channels)
    with errors_as_damage(), import_tifffile().TiffFile(io.BytesIO(data)) as file:
        stored = file.series[0].asarray(maxworkers=1)
        axes = file.series[0].axes
    if stored.size != math.prod(header.shape):
        raise Damaged(f"is a TIFF of {stored.size} numbers, but its header states {list(header.shape)}")
    stored = stored[..., None] if axes == "YX" else stored if axes == "YXS" else np.moveaxis(stored, 0, 2)
    pixels = converted(stored, min(bits, header.bits), dtype)
    if header.inverted and header.dtype.kind == "u":
        pixels = np.asarray(top_level(dtype), dtype) - pixels
    return pixels if count == channels else with_channels(pixels, channels)


@functools.cache
def import_tifffile() -> Any:
    """The module tifffile; None if it is not installed."""
    try:
        module = importlib.import_module("tifffile")
    except ImportError:
        return None
    module.logger().setLevel("CRITICAL")  # it warns of damaged metadata, which are not used
    return module
