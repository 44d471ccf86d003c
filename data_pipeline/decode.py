"""Image bytes to pixels, strictly: a damaged file raises `Damaged` with the reason and never gives half an image.

JPEG, PNG, WebP, TIFF, GIF, BMP and numpy's .npy are read; of an animation or a TIFF of several pages, the first picture. Which decoder reads a file
follows from its first bytes, not from its name; only .npy goes by the name. An EXIF orientation is not applied: the pixels come as they are stored.

What strict means: a JPEG that its decoder has any complaint about is damaged, PNG is held to the checksums of its chunks, and a file of any format
that ends too early is damaged. Changed bytes elsewhere need not show: a JPEG has no checksum, so that a hole of 64 zeros goes unseen in 2 to 70 % of
places (the more, the lower its quality) and a single bit in most, and WebP, TIFF and BMP have nothing at all. What shows those is the checksum that
the index has of every sample.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

JPEG = ("jpg", "jpeg")
IMAGES = (*JPEG, "png", "webp", "bmp", "tif", "tiff", "gif")
ARRAY = "npy"
PICTURES = (*IMAGES, ARRAY)  # members that can be a sample's image
MAX_PIXELS = 100_000_000  # a larger image is taken for damage or an attack

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow reads many more, some through other programs
_JPEG_START, _PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_PLAIN_JPEG = {
    "RGB": 3,
    "YCbCr": 3,
    "Gray": 1,
}  # colour spaces that simplejpeg gives as RGB and as luma, and their channels
# libjpeg has fast code for full size and for half size and less; what lies between takes longer to decode than the whole image. 5/8, at 1.1 of
# the time, is made up for by the resizing of fewer pixels, 6/8 and 7/8 (1.3 and 1.5) are not.
_EIGHTHS = (1, 2, 3, 4, 5)

# Of large images, for which MAX_PIXELS stands, and of damaged metadata. Not `catch_warnings`, which threads cannot share.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Damaged(Exception):
    """A sample that cannot be used, and why."""


class _Header(NamedTuple):
    height: int
    width: int
    reader: str  # "jpeg", "array" or "pillow"
    details: Any = None


class Encoded:
    """An image still in its file's bytes: the size comes from the header, the pixels when they are asked for.

    `channels` is what the pixels shall have. 3 gives RGB with transparency laid on white, 1 gives luma; any other number must be what the file holds:
    2 or 4 in a PNG, WebP or TIFF (grey or RGB with alpha; CMYK), any number in a .npy file, which holds a uint8 or uint16 array [H, W, C] or [H, W].
    16-bit grey and 16-bit arrays are scaled from 0..65535 to 0..255 and rounded. Every failure raises `Damaged`.
    """

    def __init__(self, data: bytes, extension: str, channels: int = 3):
        self.data, self.extension, self.channels = data, extension.lower(), channels
        self._header: _Header | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels, from the header alone."""
        header = self._read_header()
        return header.height, header.width

    def pixels(self, shrink: float = 1.0) -> np.ndarray:
        """The whole image, uint8 [h, w, channels].

        With `shrink` of 1.6 or more, a JPEG is decoded at the smallest of 1/8 to 5/8 of its size that keeps both sides at or above side / shrink; all
        else comes in full. libjpeg takes the means of blocks there, so that a picture of half the size shows the same detail as a resized one.
        """
        header = self._read_header()
        with _damage():
            if header.reader == "jpeg":
                return self._jpeg(header, shrink)
            if header.reader == "array":
                return _array_pixels(self.data, header, self.channels)
            return _pillow_pixels(self.data, self.channels)

    def _read_header(self) -> _Header:
        if self._header is None:
            with _damage():
                header = _header(self.data, self.extension)
                if not (0 < header.height * header.width <= MAX_PIXELS):
                    raise Damaged(f"{header.width}×{header.height} pixels, but 1 to {MAX_PIXELS} are allowed")
                self._header = header
        return self._header

    def _jpeg(self, header: _Header, shrink: float) -> np.ndarray:
        if self.channels not in (1, 3):
            raise _wrong_channels(_PLAIN_JPEG[header.details], self.channels)
        fits = [m for m in _EIGHTHS if m * shrink >= 8]
        share = fits[0] / 8 if fits else 1.0
        height, width = math.ceil(header.height * share), math.ceil(header.width * share)  # as libjpeg rounds
        colors = "RGB" if self.channels == 3 else "GRAY"
        return simplejpeg.decode_jpeg(self.data, colors, min_height=height, min_width=width, strict=True)


def decode_image(data: bytes, extension: str, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, channels] of a file's bytes: see `Encoded`. Raises `Damaged`."""
    return Encoded(data, extension, channels).pixels()


@contextmanager
def _damage() -> Iterator[None]:
    """Any failure inside becomes `Damaged`: on damaged files, decoders raise everything from OSError to SyntaxError."""
    try:
        yield
    except (Damaged, MemoryError):
        raise
    except Exception as error:
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None


def _wrong_channels(held: int, wanted: int) -> Damaged:
    return Damaged(f"holds {held} channels, but {wanted} are asked for")


def _header(data: bytes, extension: str) -> _Header:
    if extension == ARRAY:
        return _array_header(data)
    if extension not in IMAGES:
        raise Damaged(f".{extension} is no image; the extensions read are {', '.join((*IMAGES, ARRAY))}")
    if data.startswith(_JPEG_START):
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        return _Header(height, width, "jpeg" if space in _PLAIN_JPEG else "pillow", space)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return _Header(image.height, image.width, "pillow")


# ---------------------------------------------------------------- what Pillow reads


def _pillow_pixels(data: bytes, channels: int) -> np.ndarray:
    if data.startswith(_JPEG_START):  # CMYK, which Pillow turns to RGB as others do, but from damaged files too
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)
    elif data.startswith(_PNG_START):
        _check_png(data)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()
        return _convert(image, channels)


def _check_png(data: bytes) -> None:
    """Walk the chunks up to IEND. Pillow lets checksums of pixels pass, and takes a stream that ends early for a whole one."""
    place, kind = len(_PNG_START), b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise Damaged("PNG ends before its IEND chunk")
        size, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + size
        if end + 4 > len(data) or zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise Damaged(f"PNG chunk at byte {place} is cut off or differs from its checksum")
        place = end + 4


def _convert(image: Image.Image, channels: int) -> np.ndarray:
    """A loaded picture as uint8 [H, W, channels]."""
    if image.mode == "F":
        raise Damaged("holds floating-point samples, whose range is not known")
    if channels not in (1, 3):
        if len(image.getbands()) != channels:
            raise _wrong_channels(len(image.getbands()), channels)
        return np.array(image)
    if image.mode.startswith("I"):
        gray = _to_8_bits(np.asarray(image).clip(0, 65535).astype(np.uint16))
        return np.repeat(gray[..., None], channels, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    if channels == 1:
        return np.array(image.convert("L"))[..., None]
    return np.array(image.convert("RGB"))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """round(x · 255 / 65535) of unsigned 16-bit numbers."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


# ---------------------------------------------------------------- numpy files
def _array_header(data: bytes) -> _Header:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise Damaged(f".npy of version {version[0]}.{version[1]}, but 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(stream)
    if dtype.kind != "u" or dtype.itemsize not in (1, 2) or len(shape) not in (2, 3):
        raise Damaged(f".npy holds {dtype} {list(shape)}, but uint8 or uint16 [H, W, C] is read")
    shape = shape if len(shape) == 3 else (*shape, 1)
    return _Header(shape[0], shape[1], "array", (shape, dtype, "F" if columns_first else "C", stream.tell()))


def _array_pixels(data: bytes, header: _Header, channels: int) -> np.ndarray:
    shape, dtype, order, start = header.details
    if shape[2] != channels and (shape[2], channels) not in ((1, 3), (3, 1)):
        raise _wrong_channels(shape[2], channels)
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise Damaged(f".npy holds {len(data) - start} bytes of {dtype} {list(shape)}")
    pixels = np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
    pixels = pixels.copy("C") if dtype.itemsize == 1 else _to_8_bits(pixels)
    if shape[2] == channels:
        return pixels
    return np.repeat(pixels, 3, axis=2) if channels == 3 else np.array(Image.fromarray(pixels).convert("L"))[..., None]
