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

from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from common.errors import Damaged
from data_pipeline.formats.image_formats import Unsuitable

PixelDtype = Literal["uint8", "uint16", "float32"]
PIXEL_DTYPES: tuple[PixelDtype, ...] = ("uint8", "uint16", "float32")  # each holds what those before it hold
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
        if not np.isfinite(out).all():
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
    if dtype == "uint16":
        return np.array(values, np.uint16, order="C") if bits == 16 else _scaled(values, highest, np.uint16)
    if bits == 16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return _scaled(values, highest, np.uint8)


def rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers on the scale of `dtype` as that dtype: float32 is rounded and cut off at the ends of an unsigned one."""
    return values if values.dtype == dtype else values.round().clip(0, top_level(dtype)).astype(dtype)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Grey [H, W, 1] as three equal channels, or the luma of RGB [H, W, 3] as one."""
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if pixels.dtype == np.uint8:
        return np.array(Image.fromarray(pixels).convert("L"))[..., None]
    return rounded(cv2.transform(pixels.astype(np.float32), np.array([LUMA], np.float32)), pixels.dtype)[..., None]


def picture(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, C] of any dtype and channels as uint8 [H, W, 3]: of more than three channels the first three, and of
    one or two the first one."""
    if pixels.shape[2] != 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 3 else np.repeat(pixels[..., :1], 3, axis=2)
    return displayed(np.ascontiguousarray(pixels))


def displayed(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any dtype as uint8, to be looked at: those of uint16 by their highest 8 bits, float32 from the 1st to the
    99th percentile of the array."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return converted(pixels, 16, "uint8")
    low, high = np.percentile(pixels, [1, 99])
    return ((pixels - low) / max(high - low, 1e-12) * 255).round().clip(0, 255).astype(np.uint8)


def _divided(values: np.ndarray, highest: int) -> np.ndarray:
    return np.divide(values, np.float32(highest), dtype=np.float32, order="C")


def _scaled(values: np.ndarray, highest: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """round(x · top / highest) of numbers of at most 15 bits, exactly."""
    double = np.uint32(2 * top_level(np.dtype(dtype)))
    return ((values.astype(np.uint32) * double + np.uint32(highest)) // np.uint32(2 * highest)).astype(dtype)
