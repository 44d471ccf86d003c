"""Decode the image formats that are read with Pillow: PNG, WebP, TIFF, GIF, BMP, and JPEGs in CMYK.

Pillow accepts some damaged files without an error, and drops bands or pages of some TIFFs. This module raises `Damaged`
for such files.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from common.errors import Damaged
from data_pipeline.formats.image_formats import (
    JPEG_START,
    MAX_PIXELS_LIMIT,
    PNG_START,
    TIFF_STARTS,
    WRITE_ARRAY,
    WrongChannels,
    errors_as_damage,
)
from data_pipeline.formats.pixels import PixelDtype, converted, on_white, top_level, with_channels

# Pillow can open more formats, but its decoders of some of them start other programs, which is not safe.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_TIFF_PAGES = 64  # pages after the image that a TIFF may have: smaller copies of the image, and masks
STRIP_PIXELS = 1 << 22  # pixels that are converted at a time
# Numbers of TIFF tags.
TIFF_BITS = 258  # BitsPerSample
_TIFF_PAGE = 254  # NewSubfileType
_TIFF_INVERTED = 262  # PhotometricInterpretation; 0: white is zero
_TIFF_BANDS = 277  # SamplesPerPixel
_TIFF_EXTRA = 338  # ExtraSamples

# Pillow warns of large images, whose size MAX_PIXELS limits already, and of damaged metadata, which is not used. The
# warnings are ignored for the whole process, because `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = MAX_PIXELS_LIMIT  # Pillow's own limit is lower than the one that a caller may set


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an image from the bytes of its file, without decoding its pixels. Raises `Damaged`."""
    with errors_as_damage():
        try:
            image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
        except UnidentifiedImageError:  # Pillow's message names a Python object, not the reason
            if data.startswith(TIFF_STARTS):
                raise Damaged(f"is a TIFF of a kind that is not read; {WRITE_ARRAY}") from None
            formats = ", ".join(PILLOW_FORMATS)
            raise Damaged(f"is not in one of the image formats that are read: {formats}") from None
    with image:
        yield image


def tiff_tag(image: Any, number: int, default: int) -> tuple[int, ...]:
    """The integers in TIFF tag `number`, or (default,) if the file lacks the tag. Raises `Damaged` for other values."""
    with errors_as_damage():
        found = image.tag_v2.get(number, default)
    numbers = found if isinstance(found, tuple) and found else (found,)
    if not all(isinstance(each, int) for each in numbers):
        raise Damaged(f"its TIFF tag {number} holds {str(found)[:60]!r}, which is not a whole number")
    return numbers


def pillow_pixels(data: bytes, channels: int, bits: int, dtype: PixelDtype) -> np.ndarray:
    """Decode the bytes of a file with Pillow to `dtype` [H, W, channels]; see `Encoded` for `channels`, `bits` and
    `dtype`. 16-bit colours of a PNG, of which Pillow keeps 8 bits, are decoded with OpenCV unless `dtype` is uint8.

    Pillow applies the EXIF orientation of a TIFF, but not of any other format. Raises `Damaged`, or the exceptions of
    Pillow.
    """
    if data.startswith(JPEG_START):
        # A JPEG in CMYK, which Pillow converts to RGB. Because Pillow accepts damaged JPEGs, simplejpeg checks the file
        # first: it decodes at the smallest scale, 1/8, for which it reads all bytes.
        with errors_as_damage():
            simplejpeg.decode_jpeg(data, "CMYK", min_height=1, min_width=1, strict=True)
    elif data.startswith(PNG_START):
        _check_png(data)
    with open_image(data) as image:
        sixteen_bit = image.mode.startswith("I") and (image.format == "PNG" or image.mode.startswith("I;16"))
        if image.mode.startswith("I") and not sixteen_bit:
            raise Damaged(f"holds 32-bit or signed numbers, whose range of values is not known; {WRITE_ARRAY}")
        inverted = False
        if image.format == "TIFF":
            _check_tiff(image, channels)
            inverted = sixteen_bit and tiff_tag(image, _TIFF_INVERTED, 1)[0] == 0
            stored_bits = max(tiff_tag(image, TIFF_BITS, 1))
            bits = min(bits, stored_bits) if sixteen_bit else bits
            if stored_bits > 8 and not sixteen_bit and (dtype != "uint8" or bits < 16):
                raise Damaged(f"is a TIFF of 16-bit colours, of which Pillow keeps only 8 bits; {WRITE_ARRAY}")
        elif image.format == "PNG" and data[24] == 16 and not sixteen_bit:
            if dtype != "uint8":
                return _sixteen_bit_colors(data, channels, bits, dtype)
            if bits < 16:
                raise Damaged(
                    f"is a PNG of 16-bit colours: Pillow keeps only their highest 8 bits, so `bits` = {bits} cannot be"
                    " applied; write data.pixel_dtype=uint16"
                )
        with errors_as_damage():
            image.load()
        if not sixteen_bit:
            return converted(_in_strips(image, lambda part: _convert(part, channels)), 8, dtype)
        if channels not in (1, 3):
            raise WrongChannels(1, channels)
        gray = _in_strips(image, lambda part: converted(np.asarray(part).astype(np.uint16), bits, dtype)[..., None])
        if inverted:
            gray = np.asarray(top_level(dtype), dtype) - gray
        return gray if channels == 1 else with_channels(gray, 3)


def _sixteen_bit_colors(data: bytes, channels: int, bits: int, dtype: PixelDtype) -> np.ndarray:
    """Decode a PNG of 16-bit RGB, or of grey or RGB with transparency. Transparent pixels are drawn on white."""
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # [H, W, 3 or 4], BGR
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 3:
        raise Damaged("is a PNG of 16-bit colours that cannot be decoded")
    has_alpha = stored.shape[2] == 4
    stored = cv2.cvtColor(stored, cv2.COLOR_BGRA2RGBA if has_alpha else cv2.COLOR_BGR2RGB)
    count = {2: 3, 4: 2, 6: 4}[data[25]]  # of channels, by the colour type of the IHDR chunk
    if channels not in (1, 3):
        if channels != count:
            raise WrongChannels(count, channels)
        return converted(stored[..., ::3] if count == 2 else stored, bits, dtype)
    pixels = converted(on_white(stored, bits) if has_alpha else stored, bits, dtype)
    return pixels if channels == 3 else with_channels(pixels, 1)


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Convert a loaded image with `convert`, which returns an array [H, W, C] of one dtype.

    A large image is converted in horizontal strips, to limit memory: a conversion makes several copies of its input.
    """
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return convert(image)
    out = None
    for top in range(0, image.height, rows):
        part = convert(image.crop((0, top, image.width, min(top + rows, image.height))))
        if out is None:
            out = np.empty((image.height, *part.shape[1:]), part.dtype)
        out[top : top + len(part)] = part
    assert out is not None
    return out


def _check_tiff(image: Any, channels: int) -> None:
    """Raise `Damaged` for a TIFF whose bands or pages Pillow does not read completely, and WrongChannels for one whose
    fourth band Pillow would read as transparency.

    Afterwards the first page of `image` is selected.
    """
    stored, read = tiff_tag(image, _TIFF_BANDS, 1)[0], len(image.getbands())
    if stored > read:
        raise Damaged(f"holds {stored} bands, but Pillow reads only {read} of them; {WRITE_ARRAY}")
    if channels != 4 and unnamed_band(image):
        raise WrongChannels(4, channels)  # the file does not say that the fourth band is transparency
    for page in range(1, MAX_TIFF_PAGES + 1):
        with errors_as_damage():
            try:
                image.seek(page)
            except EOFError:
                return image.seek(0)
        if not tiff_tag(image, _TIFF_PAGE, 0)[0] & 5:  # the page is neither a smaller copy (1) nor a mask (4)
            break
    raise Damaged(
        "is a TIFF of several pages; write each page to a file of its own, or all of them to a .npy array [H, W, C]"
    )


def unnamed_band(image: Any) -> bool:
    """Whether Pillow reads the fourth band of a TIFF as transparency although the file does not say so."""
    with errors_as_damage():
        return image.mode == "RGBA" and not image.tag_v2.get(_TIFF_EXTRA)


def _check_png(data: bytes) -> None:
    """Raise `Damaged` if a chunk of a PNG does not match its checksum, or if the file ends before its IEND chunk.

    Pillow accepts both.
    """
    offset, kind = len(PNG_START), b""
    while kind != b"IEND":
        if offset + 12 > len(data):
            raise Damaged("is a PNG that ends before its IEND chunk")
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 8 + size
        if end + 4 > len(data) or zlib.crc32(memoryview(data)[offset + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise Damaged(f"is a PNG whose chunk at byte {offset} is cut off or does not match its checksum")
        offset = end + 4


def _convert(image: Image.Image, channels: int) -> np.ndarray:
    """Convert a loaded image to uint8 [H, W, channels]. Transparent pixels are drawn on white."""
    if image.mode == "F":
        raise Damaged(f"holds floating-point numbers, whose range of values is not known; {WRITE_ARRAY}")
    if channels not in (1, 3):
        if len(image.getbands()) != channels:
            raise WrongChannels(len(image.getbands()), channels)
        return np.array(image)
    with errors_as_damage():
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        if channels == 1:
            return np.array(image.convert("L"))[..., None]
        return np.array(image.convert("RGB"))
