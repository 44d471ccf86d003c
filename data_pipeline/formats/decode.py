"""Decode image files strictly: a damaged file raises `Damaged` with the reason, and never gives a part of an image.

The formats are JPEG, PNG, WebP, TIFF, GIF, BMP and numpy's .npy; of an animation the first picture is read. The decoder
is chosen by the first bytes of a file, not by its name; only .npy files are recognised by their name. An EXIF
orientation is applied, unless the manifest says that the pixels are to be read as they are stored. Files that cannot be
read faithfully are refused: TIFFs of several pages, of 32-bit integers, and, if tifffile is not installed, those of
other numbers or of more bands than Pillow reads.

Strict means: a JPEG is damaged if its decoder gives any warning, the checksums of all chunks of a PNG are verified, and
a file of any format that ends too early is damaged. Other changes of bytes may remain undetected. A JPEG has no
checksum: a run of 64 zeros is not detected at 2 to 70 % of the positions (more at lower quality), a single flipped bit
not at most positions. WebP, TIFF and BMP have no checksums either. The hash of every member in the index detects all of
these changes.
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
from data_pipeline.formats.exif import (
    EXIF,
    INVERSE_ORIENTATION,
    ORIENTATION,
    jpeg_exif,
    orientation,
    oriented,
    png_exif,
)
from data_pipeline.formats.image_formats import (
    ARRAY,
    IMAGES,
    JPEG_START,
    MAX_PIXELS,
    PNG_START,
    TIFF_STARTS,
    WrongChannels,
    errors_as_damage,
)
from data_pipeline.formats.pillow_images import TIFF_BITS, open_image, pillow_pixels, tiff_tag, unnamed_band
from data_pipeline.formats.pixels import PixelDtype, converted, stored_as
from data_pipeline.formats.tiff_images import read_tiff_header, tiff_pixels

# The number of channels of each colour space that simplejpeg can decode to RGB and to luma.
_PLAIN_JPEG = {"RGB": 3, "YCbCr": 3, "Gray": 1}
# Scales, in eighths, at which decoding a JPEG saves time. libjpeg has fast code for full size and for half size and
# less; other scales take longer to decode than the whole image. Of these, 5/8 takes 1.1 times as long, which resizing
# fewer pixels makes up for; 6/8 and 7/8 (1.3 and 1.5 times as long) do not pay.
_FAST_EIGHTHS = (1, 2, 3, 4, 5)
MAX_BANDS = 4  # of a TIFF of the largest number of pixels; a smaller image may have more


class ImageFacts(NamedTuple):
    """The result of `inspect`."""

    kind: str  # format, bits and channels, as stored
    low: float  # lowest value of a pixel
    high: float  # highest value of a pixel
    remarks: tuple[str, ...] = ()  # how the pixels differ from the file, for example "turned by EXIF"


class _Header(NamedTuple):
    """What is known of an image before its pixels are decoded."""

    height: int  # of the decoded pixels, with `orientation` applied
    width: int
    reader: str  # "jpeg", "array", "tiff" or "pillow"
    details: Any = None  # the colour space of a JPEG, an `ArrayHeader` or a `TiffHeader`
    orientation: int = 1  # the EXIF orientation to apply; 1: none
    dtype: PixelDtype = "uint8"  # the smallest one that keeps all bits


class Encoded:
    """An image that is decoded lazily: its size is read from the header, its pixels are decoded when `pixels` is
    called.

    `channels`: of the decoded pixels. 3 gives RGB with transparent pixels blended onto white, 1 gives luma. Any other
    number must be that of the file: 2 or 4 in a PNG, WebP or TIFF (grey or RGB with alpha; CMYK), any number in a .npy file [H, W, C]
    or a TIFF of bands. `dtype`: of the decoded pixels, see `data_pipeline/formats/pixels.py`. 16-bit numbers are scaled
    from 0..2^bits - 1, and larger ones are refused. `as_stored`: do not apply an EXIF orientation. Every failure raises
    `Damaged`. `reserve`, if it is set, is called before decoding with the number of bytes that
    decoding will use (see `Budget`).
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
        dtype: PixelDtype = "uint8",
    ):
        self.color = color  # how `crops` applies colour operations to the image: see `data_pipeline/views/colors.py`
        self.data, self.extension, self.channels = data, extension.lower(), channels
        self.bits, self.as_stored, self.max_pixels, self.dtype = bits, as_stored, max_pixels, dtype
        self.reserve: Callable[[int], None] | None = None
        self._header: _Header | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels, from the header alone."""
        header = self._read_header()
        return header.height, header.width

    @property
    def stored_dtype(self) -> PixelDtype:
        """The smallest dtype that keeps all bits of the image, from the header alone."""
        return self._read_header().dtype

    def pixels(self, shrink: float = 1.0) -> np.ndarray:
        """The whole image, `dtype` [h, w, channels].

        With `shrink` of 1.6 or more, a JPEG is decoded at the smallest of the scales 1/8 to 5/8 that is at least
        1 / shrink; other formats are decoded at full size. libjpeg averages blocks of pixels, so an image decoded at
        half size has the same detail as a resized one.
        """
        header = self._read_header()
        if self.reserve:
            self.reserve(self.decode_bytes(shrink))
        if header.reader == "jpeg":
            return oriented(converted(self._jpeg(header, shrink), 8, self.dtype), header.orientation)
        if header.reader == "array":
            return array_pixels(self.data, header.details, self.channels, self.bits, self.dtype)
        if header.reader == "tiff":
            pixels = tiff_pixels(self.data, header.details, self.channels, self.bits, self.dtype)
            return oriented(pixels, header.orientation)
        return oriented(pillow_pixels(self.data, self.channels, self.bits, self.dtype), header.orientation)

    def _read_header(self) -> _Header:
        if self._header is None:
            header = _header(self.data, self.extension, self.as_stored)
            count = header.height * header.width
            if not 0 < count <= self.max_pixels:
                more = "; data.max_pixels, and --max-pixels of `shards build`, allow more" if count else ""
                raise Damaged(f"{header.width}×{header.height} pixels, but 1 to {self.max_pixels} are allowed{more}")
            # a few bytes of a compressed TIFF can state any number of bands
            if header.reader == "tiff" and header.details.numbers > MAX_BANDS * self.max_pixels:
                raise Damaged(
                    f"{header.width}×{header.height} pixels of {header.details.shape[2]} channels, in strips or tiles of"
                    f" up to {header.details.numbers} numbers, but {MAX_BANDS * self.max_pixels} are allowed;"
                    " data.max_pixels, and --max-pixels of `shards build`, allow more"
                )
            self._header = header
        return self._header

    def decode_bytes(self, shrink: float = 1.0) -> int:
        """An estimate of the peak memory of `pixels(shrink)` in bytes, or, if that is more, the size of the pixels and
        of one copy, which a view makes of a large box.
        """
        header = self._read_header()
        # bytes per pixel of the file: of the result, and of the decoder's own memory
        itemsize = np.dtype(self.dtype).itemsize
        result = self.channels * itemsize * (_scale(shrink) ** 2 if header.reader == "jpeg" else 1)
        if header.reader in ("array", "tiff"):  # a TIFF as stored, its strips; and pixels with the channels of the file
            count, stored = header.details.shape[2], header.details.dtype.itemsize
            scratch = count * (2 * stored * (header.reader == "tiff") + itemsize * (count != self.channels))
        elif header.reader == "jpeg":
            scratch = 0
        elif header.dtype == "uint16" and self.dtype != "uint8" and self.data.startswith(PNG_START) and self.data[25]:
            scratch = (14 if self.data[25] in (4, 6) else 6) + 3 * itemsize * (self.channels == 1)  # 16-bit colours
        else:
            is_webp = self.data.startswith(b"RIFF")
            scratch = 16 if is_webp else 4  # one RGBA copy; the decoder of WebP makes four
        if self.data.startswith(JPEG_START) and _needs_all_coefficients(self.data):
            scratch += 2 * max(3, scratch)  # two bytes for each coefficient
        return round(header.height * header.width * max(2 * result, result + scratch))

    def _jpeg(self, header: _Header, shrink: float) -> np.ndarray:
        if self.channels not in (1, 3):
            raise WrongChannels(_PLAIN_JPEG[header.details], self.channels)
        scale = _scale(shrink)
        height, width = math.ceil(header.height * scale), math.ceil(header.width * scale)  # as libjpeg rounds
        if header.orientation >= 5:  # rotated by 90°; simplejpeg expects the stored sides
            height, width = width, height
        colors = "RGB" if self.channels == 3 else "GRAY"
        with errors_as_damage():
            return simplejpeg.decode_jpeg(self.data, colors, min_height=height, min_width=width, strict=True)


def decode_image(
    data: bytes,
    extension: str,
    channels: int = 3,
    bits: int = 16,
    as_stored: bool = False,
    dtype: PixelDtype = "uint8",
) -> np.ndarray:
    """Decode the bytes of a file to `dtype` [H, W, channels]: see `Encoded`. Raises `Damaged`."""
    return Encoded(data, extension, channels, bits, as_stored, dtype=dtype).pixels()


def inspect(
    data: bytes, extension: str, bits: int = 16, as_stored: bool = False, max_pixels: int = MAX_PIXELS
) -> ImageFacts:
    """Decode a whole file with the channels that it has, and return facts about it.

    Raises `Damaged` if no number of channels can read it.
    """
    encoded = Encoded(data, extension, 3, bits, as_stored, max_pixels)
    header = encoded._read_header()
    encoded.dtype = encoded.stored_dtype
    orientation_remark = ("turned by EXIF",) * (header.orientation > 1 and not as_stored)
    if header.reader in ("array", "tiff"):
        shape, dtype = header.details.shape, header.details.dtype
        encoded.channels = shape[2]
        numbers = f"{8 * dtype.itemsize} bits" if dtype.kind == "u" else dtype.newbyteorder("=").name
        kind = f"{'NPY' if header.reader == 'array' else 'TIFF'}, {numbers}, {_channels(shape[2])}"
        return ImageFacts(kind, *_stored_range(encoded), orientation_remark)
    if header.reader == "jpeg":
        kind = f"JPEG, 8 bits, {_channels(_PLAIN_JPEG[header.details])}"
        return ImageFacts(kind, *_stored_range(encoded), orientation_remark)
    with open_image(data) as image:
        kind, tiff_orientation = _describe_stored(image, data)
        orientation_remark = orientation_remark or ("turned by EXIF",) * (not as_stored and tiff_orientation > 1)
        with errors_as_damage():
            animated = image.format != "TIFF" and getattr(image, "is_animated", False)
        encoded.channels = 4 if image.format == "TIFF" and unnamed_band(image) else 3
    remarks = (*("animation, first picture",) * animated, *orientation_remark)
    return ImageFacts(kind, *_stored_range(encoded), remarks)


def _stored_range(encoded: Encoded) -> tuple[float, float]:
    """The lowest and the highest number of an image, as stored. Raises `Damaged`."""
    pixels = encoded.pixels()  # also refuses numbers of too many bits
    if encoded.bits < 16 and encoded.dtype == "uint16":
        encoded.bits = 16
        pixels = encoded.pixels()
    return pixels.min().item(), pixels.max().item()


def _scale(shrink: float) -> float:
    """The scale at which a JPEG is decoded: the smallest fast one of at least 1 / shrink, or 1 if there is none."""
    return next((eighths / 8 for eighths in _FAST_EIGHTHS if eighths * shrink >= 8), 1.0)


def _channels(count: int) -> str:
    return f"{count} channel{'s' * (count > 1)}"


def _describe_stored(image: Image.Image, data: bytes) -> tuple[str, int]:
    """(format, bits and channels as text; the orientation of a TIFF)."""
    bits, tiff_orientation, bands = 8, 1, len(image.getbands())
    if image.format == "PNG":
        bits = data[24]  # of the IHDR chunk
    elif image.format == "TIFF":
        bits, tiff_orientation = max(tiff_tag(image, TIFF_BITS, 1)), tiff_tag(image, ORIENTATION, 1)[0]
    palette = ", palette" if image.mode in ("P", "PA") else ""
    return f"{image.format}, {bits} bits, {_channels(bands)}{palette}", tiff_orientation


def _header(data: bytes, extension: str, as_stored: bool) -> _Header:
    if not data:
        raise Damaged("is empty: 0 bytes")
    if extension == ARRAY:
        array = read_array_header(data)
        return _Header(*array.shape[:2], "array", array, 1, stored_as(array.dtype))
    if extension not in IMAGES:
        raise Damaged(
            f".{extension} is not the extension of an image format that is read; these are"
            f" {', '.join((*IMAGES, ARRAY))}"
        )
    if data.startswith(JPEG_START):
        with errors_as_damage():
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        to_apply = 1 if as_stored else orientation(jpeg_exif(data))
        if to_apply >= 5:
            height, width = width, height
        return _Header(height, width, "jpeg" if space in _PLAIN_JPEG else "pillow", space, to_apply)
    tiff = read_tiff_header(data) if data.startswith(TIFF_STARTS) else None
    if tiff is not None:
        height, width, _ = tiff.shape
        to_apply = 1 if as_stored or tiff.orientation not in range(1, 9) else tiff.orientation
        if to_apply >= 5:
            height, width = width, height
        return _Header(height, width, "tiff", tiff, to_apply, stored_as(tiff.dtype))
    with open_image(data) as image:
        height, width = image.height, image.width
        deep = image.mode.startswith("I") or (image.format == "PNG" and data[24] == 16)  # the bits of the IHDR chunk
        if image.format == "TIFF":  # Pillow applies the orientation when it loads the file
            deep = deep or max(tiff_tag(image, TIFF_BITS, 1)) > 8
            to_apply = INVERSE_ORIENTATION.get(tiff_tag(image, ORIENTATION, 1)[0], 1) if as_stored else 1
        else:
            exif = png_exif(data) if image.format == "PNG" else image.info.get("exif", b"")
            to_apply = 1 if as_stored else orientation(exif.removeprefix(EXIF))
        if to_apply >= 5:
            height, width = width, height
        return _Header(height, width, "pillow", None, to_apply, "uint16" if deep else "uint8")


def _needs_all_coefficients(data: bytes) -> bool:
    """Whether a JPEG stores its channels in separate scans, or is progressive, so that its decoder holds the
    coefficients of the whole image in memory. True if the markers of the file cannot be read.
    """
    offset, channels = 2, 0  # of the current segment; of the frame
    while data[offset : offset + 1] == b"\xff" and offset + 10 <= len(data):
        marker = data[offset + 1]
        if marker == 0xC2:  # a progressive frame
            return True
        if marker in (0xC0, 0xC1):  # a sequential frame
            channels = data[offset + 9]
        elif marker == 0xDA:  # the first scan, with the number of its channels
            return data[offset + 4] < channels
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4])
    return True
