"""Decodes image files strictly: a damaged file raises `Damaged` with the reason and never yields part of an image.

The formats are JPEG, PNG, WebP, TIFF, GIF, BMP and numpy's .npy; of an animation the first picture is read. The decoder
is chosen by the first bytes of a file, not by its name; only .npy goes by the name. An EXIF orientation is applied,
unless the data set says that its pixels are meant as they are stored. Files that cannot be read faithfully are refused:
TIFFs of several pages, of 32-bit, signed or floating-point numbers, or of more bands than are read.

Strict means: a JPEG is damaged if its decoder gives any warning, the checksums of all chunks of a PNG are verified, and
a file of any format that ends too early is damaged. Other changes of bytes may go unnoticed. A JPEG has no checksum: a
run of 64 zeros is not noticed at 2 to 70 % of the positions (more at lower quality), a single flipped bit at most
positions. WebP, TIFF and BMP have no checksums either. The hash that the index has of every member detects all of
these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from common.errors import Damaged
from data_pipeline.formats.array_images import array_pixels, read_array_header
from data_pipeline.formats.exif import EXIF, INVERSE_ORIENTATION, ORIENTATION, jpeg_exif, orientation, png_exif, turned
from data_pipeline.formats.image_formats import ARRAY, IMAGES, JPEG_START, MAX_PIXELS, WrongChannels, decoder
from data_pipeline.formats.pillow_images import TIFF_BITS, opened, pillow_pixels, tag, unnamed_band

# The number of channels of each colour space that simplejpeg can decode to RGB and to luma.
_PLAIN_JPEG = {"RGB": 3, "YCbCr": 3, "Gray": 1}
# libjpeg has fast code for full size and for half size and less; other scales take longer to decode than the whole
# image. Of these, 5/8 takes 1.1 times as long, which is gained back by resizing fewer pixels; 6/8 and 7/8 (1.3 and 1.5
# times) lose.
_FAST_EIGHTHS = (1, 2, 3, 4, 5)


class ImageFacts(NamedTuple):
    """The result of `inspect`."""

    kind: str  # format, bits and channels, as stored
    low: int  # lowest number
    high: int  # highest number
    remarks: tuple[str, ...] = ()  # how the pixels differ from the file, for example "turned by EXIF"


class _Header(NamedTuple):
    """`height` and `width` are those of the decoded pixels; `turn` is the EXIF orientation (1: none)."""

    height: int
    width: int
    reader: str  # "jpeg", "array" or "pillow"
    details: Any = None  # the colour space of a JPEG, or an `ArrayHeader`
    turn: int = 1


class Encoded:
    """An image that is decoded lazily: its size is read from the header, its pixels are decoded when they are asked
    for.

    `channels`: of the decoded pixels. 3 gives RGB with transparent pixels blended onto white, 1 gives luma. Any other
    number must be that of the file: 2 or 4 in a PNG, WebP or TIFF (grey or RGB with alpha; CMYK), any number in a .npy
    file, which holds a uint8 or uint16 array [H, W, C] or [H, W]. 16-bit grey and 16-bit arrays are scaled from
    0..2^bits - 1 to 0..255 and rounded; larger numbers are refused. `as_stored`: do not apply an EXIF orientation.
    Every failure raises `Damaged`. `reserve`, if it is set, is called before decoding with the number of bytes that it
    will use (`Budget`).
    """

    def __init__(
        self,
        data: bytes,
        extension: str,
        channels: int = 3,
        bits: int = 16,
        as_stored: bool = False,
        max_pixels: int = MAX_PIXELS,
        color: str = "exact",
    ):
        self.color = color  # how `crops` applies colour operations to it: see `data_pipeline/views/colors.py`
        self.data, self.extension, self.channels = data, extension.lower(), channels
        self.bits, self.as_stored, self.max_pixels = bits, as_stored, max_pixels
        self.reserve: Callable[[int], None] | None = None
        self._header: _Header | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels, from the header alone."""
        header = self._read_header()
        return header.height, header.width

    def pixels(self, shrink: float = 1.0) -> np.ndarray:
        """The whole image, uint8 [h, w, channels].

        With `shrink` of 1.6 or more, a JPEG is decoded at the smallest of the scales 1/8 to 5/8 that keeps both sides
        at or above side / shrink; other formats are decoded at full size. libjpeg averages blocks there, so an image
        decoded at half size has the same detail as a resized one.
        """
        header = self._read_header()
        if self.reserve:
            self.reserve(self.decode_bytes(shrink))
        if header.reader == "jpeg":
            return turned(self._jpeg(header, shrink), header.turn)
        if header.reader == "array":
            return array_pixels(self.data, header.details, self.channels, self.bits)
        return turned(pillow_pixels(self.data, self.channels, self.bits), header.turn)

    def _read_header(self) -> _Header:
        if self._header is None:
            header = _header(self.data, self.extension, self.as_stored)
            if not (0 < (count := header.height * header.width) <= self.max_pixels):
                more = "; data.max_pixels, and --max-pixels of `shards build`, allow more" if count else ""
                raise Damaged(f"{header.width}×{header.height} pixels, but 1 to {self.max_pixels} are allowed{more}")
            self._header = header
        return self._header

    def decode_bytes(self, shrink: float = 1.0) -> int:
        """Roughly the peak memory of `pixels(shrink)` in bytes, or the size of the pixels and a copy, which a view
        makes of a large box, if that is more.
        """
        header = self._read_header()
        out = self.channels * (_scale(shrink) ** 2 if header.reader == "jpeg" else 1)  # bytes per pixel of the file
        if header.reader == "array":
            shape, dtype = header.details.shape, header.details.dtype
            scratch = shape[2] * (5 if dtype.itemsize > 1 else 1)
        else:  # Pillow's own copy; its WebP decoder makes four
            scratch = 0 if header.reader == "jpeg" else 16 if self.data.startswith(b"RIFF") else 4
            if self.data.startswith(JPEG_START) and _needs_all_coefficients(self.data):
                scratch += 2 * max(3, scratch)  # two bytes for each coefficient
        return round(header.height * header.width * max(2 * out, out + scratch))

    def _jpeg(self, header: _Header, shrink: float) -> np.ndarray:
        if self.channels not in (1, 3):
            raise WrongChannels(_PLAIN_JPEG[header.details], self.channels)
        scale = _scale(shrink)
        height, width = math.ceil(header.height * scale), math.ceil(header.width * scale)  # as libjpeg rounds
        if header.turn >= 5:
            height, width = width, height
        colors = "RGB" if self.channels == 3 else "GRAY"
        with decoder():
            return simplejpeg.decode_jpeg(self.data, colors, min_height=height, min_width=width, strict=True)


def decode_image(data: bytes, extension: str, channels: int = 3, bits: int = 16, as_stored: bool = False) -> np.ndarray:
    """Decode the bytes of a file to uint8 [H, W, channels]: see `Encoded`. Raises `Damaged`."""
    return Encoded(data, extension, channels, bits, as_stored).pixels()


def inspect(
    data: bytes, extension: str, bits: int = 16, as_stored: bool = False, max_pixels: int = MAX_PIXELS
) -> ImageFacts:
    """Decode a whole file with the channels that it has, and describe it.

    Raises `Damaged` if no number of channels can read it.
    """
    encoded = Encoded(data, extension, 3, bits, as_stored, max_pixels)
    header = encoded._read_header()
    if header.reader == "array":
        shape, dtype = header.details.shape, header.details.dtype
        encoded.channels = shape[2]
        encoded.pixels()
        values = np.frombuffer(data, dtype, offset=header.details.start)
        return ImageFacts(
            f"NPY, {8 * dtype.itemsize} bits, {_channels(shape[2])}", int(values.min()), int(values.max())
        )
    orientation_remark = ("turned by EXIF",) * (header.turn > 1 and not as_stored)
    if header.reader == "jpeg":
        pixels = encoded.pixels()
        kind = f"JPEG, 8 bits, {_channels(_PLAIN_JPEG[header.details])}"
        return ImageFacts(kind, int(pixels.min()), int(pixels.max()), orientation_remark)
    with opened(data) as image:
        kind, depth_remark, turn = _stored(image, data)
        orientation_remark = orientation_remark or ("turned by EXIF",) * (not as_stored and turn > 1)
        with decoder():
            animated = image.format != "TIFF" and getattr(image, "is_animated", False)
        encoded.channels = 4 if image.format == "TIFF" and unnamed_band(image) else 3
        pixels = encoded.pixels()
        if image.mode.startswith("I"):
            with decoder():
                image.load()
                pixels = np.asarray(image)
    animation_remark = ("animation, first picture",) * animated
    remarks = (*depth_remark, *orientation_remark, *animation_remark)
    return ImageFacts(kind, int(pixels.min()), int(pixels.max()), remarks)


def _scale(shrink: float) -> float:
    """The scale at which a JPEG is decoded: the smallest fast one of at least 1 / shrink, or 1."""
    return next((m / 8 for m in _FAST_EIGHTHS if m * shrink >= 8), 1.0)


def _channels(count: int) -> str:
    return f"{count} channel{'s' * (count > 1)}"


def _stored(image: Image.Image, data: bytes) -> tuple[str, tuple[str, ...], int]:
    """(format, bits and channels as text; remarks if fewer bits are read than stored; the orientation of a TIFF)."""
    bits, turn, bands = 8, 1, len(image.getbands())
    if image.format == "PNG":
        bits = data[24]  # of the IHDR chunk
    elif image.format == "TIFF":
        bits, turn = max(tag(image, TIFF_BITS, 1)), tag(image, ORIENTATION, 1)[0]
    palette = ", palette" if image.mode in ("P", "PA") else ""
    sixteen_bit = ("16-bit colours, read at 8 bits",) * (bits > 8 and not image.mode.startswith("I"))
    return f"{image.format}, {bits} bits, {_channels(bands)}{palette}", sixteen_bit, turn


def _header(data: bytes, extension: str, as_stored: bool) -> _Header:
    if not data:
        raise Damaged("is empty: 0 bytes")
    if extension == ARRAY:
        array = read_array_header(data)
        return _Header(array.shape[0], array.shape[1], "array", array)
    if extension not in IMAGES:
        raise Damaged(f".{extension} is no image; the extensions read are {', '.join((*IMAGES, ARRAY))}")
    if data.startswith(JPEG_START):
        with decoder():
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        turn = 1 if as_stored else orientation(jpeg_exif(data))
        if turn >= 5:
            height, width = width, height
        return _Header(height, width, "jpeg" if space in _PLAIN_JPEG else "pillow", space, turn)
    with opened(data) as image:
        height, width = image.height, image.width
        if image.format == "TIFF":  # Pillow applies the orientation when it loads the file
            turn = INVERSE_ORIENTATION.get(tag(image, ORIENTATION, 1)[0], 1) if as_stored else 1
        else:
            exif = png_exif(data) if image.format == "PNG" else image.info.get("exif", b"")
            turn = 1 if as_stored else orientation(exif.removeprefix(EXIF))
        if turn >= 5:
            height, width = width, height
        return _Header(height, width, "pillow", None, turn)


def _needs_all_coefficients(data: bytes) -> bool:
    """Whether a JPEG stores channels or frequencies one after the other, so that its decoder holds the coefficients of
    the whole image in memory.
    """
    place, channels = 2, 0
    while data[place : place + 1] == b"\xff" and place + 10 <= len(data):
        kind = data[place + 1]
        if kind == 0xDA:  # the first scan
            return data[place + 4] < channels
        if kind in (0xC0, 0xC1, 0xC2):  # the frame
            if kind == 0xC2:
                return True
            channels = data[place + 9]
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return True
