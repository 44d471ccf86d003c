"""Decoders of compressed DICOM images, as a plugin of pydicom: lossless JPEG, JPEG-LS and JPEG of 12 bits with imagecodecs.
The other formats are decoded by pydicom (RLE) and Pillow (JPEG, JPEG 2000), so that no decoder is used that ends the
process when a file is damaged.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder, iter_pixels

NAME = "imagecodecs"
JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
DECODER_DEPENDENCIES = dict.fromkeys((*JPEG_LS, uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGExtended12Bit), (NAME,))
_PLUGINS = {
    **dict.fromkeys(DECODER_DEPENDENCIES, NAME),
    **dict.fromkeys((uid.JPEGBaseline8Bit, uid.JPEG2000, uid.JPEG2000Lossless), "pillow"),
    uid.RLELossless: "pydicom",
}


def is_available(_: str) -> bool:
    """Whether the plugin can be used; pydicom asks."""
    return True


def decode_frame(data: bytes, runner: Any) -> bytearray:
    """The pixels of a frame, row by row, the samples of a pixel side by side; pydicom calls it."""
    import imagecodecs

    height, width = stated_size(data)
    if (height, width) != (runner.rows, runner.columns):
        raise ValueError(f"states {runner.columns}×{runner.rows} pixels, but holds a JPEG of {width}×{height}")
    decode = imagecodecs.jpegls_decode if runner.transfer_syntax in JPEG_LS else imagecodecs.jpeg8_decode
    values = np.ascontiguousarray(decode(data))
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    return bytearray(values)


def stated_size(data: bytes) -> tuple[int, int]:
    """(height, width) in the first frame header of a JPEG or JPEG-LS, before anything of its size is allocated; (0, 0)
    without one."""
    start = 2
    while data[start : start + 1] == b"\xff":
        marker = int.from_bytes(data[start + 1 : start + 2], "big")
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            height, width = data[start + 5 : start + 7], data[start + 7 : start + 9]
            return int.from_bytes(height, "big"), int.from_bytes(width, "big")
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return 0, 0


def frames(header: Any, first: int, count: int) -> Any:
    """An iterator over the frames of a dataset of pydicom, as arrays [H, W] or [H, W, 3]."""
    _add_plugin()
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax not in _PLUGINS:
        raise ValueError(f"is compressed as {syntax.name}, which is not read")
    return iter_pixels(header, indices=range(first, first + count), decoding_plugin=_PLUGINS.get(syntax, ""))


@functools.cache
def _add_plugin() -> None:
    for syntax in DECODER_DEPENDENCIES:
        get_decoder(syntax).add_plugin(NAME, (__name__, decode_frame.__name__))
