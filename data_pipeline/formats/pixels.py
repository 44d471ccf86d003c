"""The dtypes of pixels: how the numbers of a file become those of a run (`data.pixel_dtype`).

    stored               → uint8                  → uint16                      → float32
    unsigned, 8 bits     unchanged                257 · x                       x / 255
    unsigned, 16 bits    255 · x / top, rounded   65,535 · x / top, rounded     x / top
    signed or float      refused                  refused                       unchanged

`top` is 2^bits − 1, where `bits` is what the shards state (`--bits` of `shards build`; 16 by default). So uint16 keeps
all bits of an unsigned image, and float32 keeps those of float16, float32 and int16; float64 is rounded to float32.
A mean and a deviation of `data.mean` and `data.std` are those of the float32 numbers: on a scale from 0 to 1 for
unsigned images, and in the unit of the file for others, such as reflectances or Hounsfield units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from common.errors import Damaged
from data_pipeline.formats.image_formats import Unsuitable

PixelDtype = Literal["uint8", "uint16", "float32"]
PIXEL_DTYPES: tuple[PixelDtype, ...] = ("uint8", "uint16", "float32")  # each holds what those before it hold
PART_NUMBERS = 1 << 18  # numbers that are converted at a time
LUMA = (0.299, 0.587, 0.114)  # of RGB: ITU-R BT.601, as Pillow has it
FLOATS = ("int16", "float16", "float32", "float64")  # what can be stored and is not unsigned


class WrongDtype(Unsuitable):
    """Signed or float pixels in a run of unsigned ones, whose range of values is not known."""

    def __init__(self, stored: np.dtype, wanted: str):
        super().__init__(
            f"holds {stored} pixels, whose range of values is not known, but {wanted} is requested",
            "write data.pixel_dtype=float32, with data.mean and data.std in the unit of the pixels",
        )


def top_level(dtype: Any) -> float:
    """The highest number of a dtype of numpy or torch, which stands for 1: 255, 65,535, or 1 for float32."""
    return {"uint8": 255, "uint16": 65535}.get(str(dtype).removeprefix("torch."), 1)


def stored_as(dtype: np.dtype) -> PixelDtype:
    """The first of `PIXEL_DTYPES` that keeps all bits of a stored dtype."""
    return "float32" if dtype.kind != "u" else "uint8" if dtype.itemsize == 1 else "uint16"


def converted(values: np.ndarray, bits: int, dtype: PixelDtype) -> np.ndarray:
    """Stored numbers of any shape as `dtype`, by the table of this module, in a C-contiguous array that can be written.

    Raises `Damaged` for an unsigned number above 2^bits − 1, NaN and infinity, and `WrongDtype`.
    """
    if values.dtype.kind != "u":
        if dtype != "float32":
            raise WrongDtype(values.dtype, dtype)
        with np.errstate(over="ignore"):
            out = np.array(values, np.float32, order="C")
        if not all(np.isfinite(out[part]).all() for part in _parts(out)):
            raise Damaged("holds NaN, infinity or numbers beyond float32; replace them, for example by the mean")
        return out
    if values.dtype.itemsize == 1:
        if dtype == "uint8":
            return np.require(values, requirements=["C", "W"])
        return np.array(values, np.uint16, order="C") * np.uint16(257) if dtype == "uint16" else _divided(values, 255)
    highest = (1 << bits) - 1
    if bits < 16 and values.size and values.max() > highest:
        raise Damaged(f"holds numbers up to {values.max()}, but the {bits} bits of this set end at {highest}")
    if dtype == "float32":
        return _divided(values, highest)
    if dtype == "uint16" and bits == 16:
        return np.array(values, np.uint16, order="C")
    double, half = np.uint32(2 * top_level(dtype)), np.uint32(highest)
    if bits == 16:
        return _by_parts(values, dtype, lambda part: (part + np.uint32(128)) // np.uint32(257))
    return _by_parts(values, dtype, lambda part: (part * double + half) // np.uint32(2 * highest))


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers on the scale of `dtype` as that dtype: float32 is rounded and cut off at the ends of an unsigned one."""
    return values if values.dtype == dtype else values.round().clip(0, top_level(dtype)).astype(dtype)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey [H, W, 1] as three equal channels, or the luma of RGB [H, W, 3] as one."""
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L"))[..., None]
    out, matrix = np.empty(pixels.shape[:2], pixels.dtype), np.array([LUMA], np.float32)
    for part in _parts(pixels):
        out[part] = rounded(cv2.transform(pixels[part].astype(np.float32), matrix), pixels.dtype)
    return out[..., None]


def on_white(pixels: np.ndarray, bits: int, premultiplied: bool = False) -> np.ndarray:
    """uint16 [H, W, C + 1], whose last channel is transparency (65,535: opaque), drawn on white (2^bits − 1): [H, W, C]."""
    out = np.empty((*pixels.shape[:2], pixels.shape[2] - 1), np.uint16)
    white = np.uint32((1 << bits) - 1)
    for part in _parts(pixels):
        numbers = pixels[part].astype(np.uint32)  # a product of two of them is below 2^32
        front, alpha = numbers[..., :-1], numbers[..., -1:]
        behind = white * (65535 - alpha)
        if premultiplied:
            out[part] = np.minimum(front + (behind + 32767) // 65535, white)
        else:
            out[part] = (front * alpha + behind + 32767) // 65535
    return out


def picture(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, C] of any dtype and channels as uint8 [H, W, 3]: of more than three channels the first three, and of
    one or two the first one."""
    if pixels.shape[2] != 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 3 else np.repeat(pixels[..., :1], 3, axis=2)
    return displayed(np.ascontiguousarray(pixels))


def displayed(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any dtype as uint8, to be looked at: uint16 scaled to 8 bits, and float32 from the 1st to the 99th
    percentile of the array."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return converted(pixels, 16, "uint8")
    low, high = np.percentile(pixels, [1, 99])
    return ((pixels - low) / max(high - low, 1e-12) * 255).round().clip(0, 255).astype(np.uint8)


def _divided(values: np.ndarray, highest: int) -> np.ndarray:
    return np.divide(values, np.float32(highest), dtype=np.float32, order="C")


def _by_parts(values: np.ndarray, dtype: Any, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function`, which maps uint32 to uint32, of all values, as `dtype`."""
    out = np.empty(values.shape, dtype)
    for part in _parts(values):
        out[part] = function(values[part].astype(np.uint32))
    return out


def _parts(values: np.ndarray) -> Iterator[slice]:
    """Slices of the first dimension that hold about PART_NUMBERS each, which limits the memory of temporary copies."""
    step = max(1, PART_NUMBERS * max(1, len(values)) // max(1, values.size))
    return (slice(top, top + step) for top in range(0, len(values), step))
