"""Images as numpy arrays: .npy files that hold uint8 or uint16 [H, W, C] or [H, W]."""

from __future__ import annotations

import io
import math
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from common.errors import Damaged
from data_pipeline.formats.image_formats import WrongChannels, errors_as_damage


class ArrayHeader(NamedTuple):
    """The header of a .npy file. `start`: the byte at which its numbers begin."""

    shape: tuple[int, int, int]  # [H, W, C]
    dtype: np.dtype
    order: Literal["C", "F"]
    start: int


def read_array_header(data: bytes) -> ArrayHeader:
    """The header of a .npy file. Raises `Damaged` for a version, dtype or number of dimensions that is not
    supported."""
    stream = io.BytesIO(data)
    with errors_as_damage():
        version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise Damaged(f".npy of version {version[0]}.{version[1]}, but 1.0 and 2.0 are read")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with errors_as_damage():
        shape, columns_first, dtype = read(stream)
    supported = dtype.kind == "u" and dtype.itemsize in (1, 2) and len(shape) in (2, 3)
    if not supported or min(shape) < 0 or shape[2:] == (0,):
        raise Damaged(f".npy holds {dtype} {list(shape)}, but uint8 or uint16 [H, W, C] is read")
    shape = shape if len(shape) == 3 else (*shape, 1)
    return ArrayHeader(shape, dtype, "F" if columns_first else "C", stream.tell())


def array_pixels(data: bytes, header: ArrayHeader, channels: int, bits: int) -> np.ndarray:
    """The pixels of a .npy file, uint8 [H, W, channels]; see `Encoded` for `channels` and `bits`."""
    shape, dtype, order, start = header
    if shape[2] != channels and (shape[2], channels) not in ((1, 3), (3, 1)):
        raise WrongChannels(shape[2], channels)
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise Damaged(f".npy holds {len(data) - start} bytes of {dtype} {list(shape)}")
    pixels = np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
    pixels = pixels.copy("C") if dtype.itemsize == 1 else to_8_bits(pixels, bits)
    if shape[2] == channels:
        return pixels
    return np.repeat(pixels, 3, axis=2) if channels == 3 else np.array(Image.fromarray(pixels).convert("L"))[..., None]


def to_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """round(x · 255 / (2^bits - 1)) of unsigned 16-bit numbers.

    Raises `Damaged` if a number is larger than 2^bits - 1.
    """
    if bits == 16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    top = (1 << bits) - 1
    if values.max() > top:
        raise Damaged(f"holds numbers up to {values.max()}, but the {bits} bits of this set end at {top}")
    return ((values.astype(np.uint32) * 510 + top) // (2 * top)).astype(np.uint8)
