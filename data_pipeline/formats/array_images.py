"""Images as numpy arrays: .npy files that hold numbers [H, W, C] or [H, W] of a dtype that `pixels.py` names."""

from __future__ import annotations

import io
import math
from typing import Literal, NamedTuple

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.image_formats import WrongChannels, errors_as_damage
from data_pipeline.formats.pixels import FLOATS, PixelDtype, converted, with_channels


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
    supported = dtype.newbyteorder("=").name in ("uint8", "uint16", *FLOATS) and len(shape) in (2, 3)
    if not supported or min(shape) < 0 or shape[2:] == (0,):
        raise Damaged(f".npy holds {dtype} {list(shape)}, but [H, W, C] of uint8, uint16, {', '.join(FLOATS)} is read")
    shape = shape if len(shape) == 3 else (*shape, 1)
    return ArrayHeader(shape, dtype, "F" if columns_first else "C", stream.tell())


def array_pixels(data: bytes, header: ArrayHeader, channels: int, bits: int, dtype: PixelDtype) -> np.ndarray:
    """The pixels of a .npy file, `dtype` [H, W, channels]; see `Encoded` for `channels`, `bits` and `dtype`."""
    shape, stored, order, start = header
    if shape[2] != channels and (shape[2], channels) not in ((1, 3), (3, 1)):
        raise WrongChannels(shape[2], channels)
    if len(data) - start != math.prod(shape) * stored.itemsize:
        raise Damaged(f".npy holds {len(data) - start} bytes of {stored} {list(shape)}")
    pixels = converted(np.frombuffer(data, stored, offset=start).reshape(shape, order=order), bits, dtype)
    return pixels if shape[2] == channels else with_channels(pixels, channels)
