"""Colour operations on images with OpenCV: jitter, grey, blur and solarize, with torchvision's parameters.

There are three modes (`sample["color"]`), which use the same random numbers:

    exact    torchvision's operations one by one, each rounded and clipped to uint8, on the whole image as it is stored
    fused    brightness, contrast, saturation, hue and grey as one matrix. With luma L(x), all but hue map
             x → a·x + b·L(x) + c, which compose as three numbers and commute with a hue rotation that keeps L. The
             result differs from exact views, because no step is clipped and because hue is rotated in the
             chroma plane of YIQ, whereas torchvision rotates it in HSV. A JPEG is also decoded no larger than its views
             need; a view for which it is just large enough has 0.92 of the detail (gradient energy), whereas exact
             views have all of it
    device   as fused, but the matrix, blur and solarize run on the device (`data_pipeline/views/device_color.py`), for
             a whole batch, with parameters that the data workers return beside the views

Images that do not have three channels have no hue, saturation or grey: these operations do not change them. Images of
uint16 and float32 are always treated as `fused` does, in float32; float32 has no highest level, so that `solarize` does
not change it.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import cv2
import numpy as np

from data_pipeline.formats.pixels import LUMA, rounded

MODES = ("exact", "fused", "device")

# The map x → own · rotation(x) + luma · L(x) + constant as a sum of five [3, 4] matrices. Their coefficients are own,
# own · cos and own · sin of the angle of rotation, luma, and constant.
_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
_IN_YIQ = np.array([np.diag([1, 0, 0]), np.diag([0, 1, 1]), [[0, 0, 0], [0, 0, 1], [0, -1, 0]]])
BASIS = np.zeros((5, 3, 4))
BASIS[:3, :, :3] = np.linalg.inv(_YIQ) @ _IN_YIQ @ _YIQ
BASIS[3, :, :3], BASIS[4, :, 3] = LUMA, 1
BASIS = BASIS.reshape(5, 12)  # [5, 3, 4] -> [5, 12]


class ColorParams(Protocol):
    """The random numbers of the colour operations of one view (`augmentations.Params`)."""

    @property
    def jitter(self) -> tuple[tuple[str, float], ...]: ...
    @property
    def gray(self) -> bool: ...
    @property
    def sigma(self) -> float: ...
    @property
    def solarize(self) -> bool: ...


# ---------------------------------------------------------------- mode exact; images are [H, W, C], or [H, W] if grey
# This offset makes OpenCV, which rounds to the nearest level, round down in the next three operations, as torchvision
# and Pillow do. Without it, views are up to 1.5 levels brighter than the published ones. It is slightly less than half
# a level, so that whole numbers do not change.
_ROUND_DOWN = -0.498


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """factor · x."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_ROUND_DOWN)  # the result -0.498 becomes 0


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Contrast around the mean luma of the image, or around the mean of all channels if they are not RGB."""
    constant = (1 - factor) * _mean_luma(image) + _ROUND_DOWN
    if _channels(image) != 3:
        return cv2.addWeighted(image, factor, image, 0, constant)
    return cv2.transform(image, _matrix(factor, 0, constant, 0))  # two thirds of addWeighted's time


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Saturation: the contrast of the channels around the luma of each pixel."""
    return image if _channels(image) != 3 else cv2.transform(image, _matrix(factor, 1 - factor, _ROUND_DOWN, 0))


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Rotate the hue in HSV by `shift` of a full turn, in steps of 1/256."""
    if _channels(image) != 3:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv += _hue_channel(hsv.shape) * np.uint8(int(shift * 255) & 255)  # wraps around, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma as [H, W], so that later operations have a third of the work."""
    return image if _channels(image) != 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of at most 9 taps, mirrored at the edges. Taps below 3e-5 are omitted, because they have no effect
    in 8 bits.

    `sepFilter2D` takes half the time of `GaussianBlur` and is more accurate: its weights are not rounded to 8 bits.
    """
    radius = min(4, int(sigma * math.sqrt(-2 * math.log(3e-5))))
    if not radius:
        return image
    weights = cv2.getGaussianKernel(2 * radius + 1, sigma)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def solarize(image: np.ndarray) -> np.ndarray:
    """Invert pixels of 128 or more: min(x, 255 − x)."""
    return cv2.min(image, cv2.bitwise_not(image))


_OPERATIONS = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
JITTER = tuple(_OPERATIONS)  # in the order of `Augment.jitter`


def exact(image: np.ndarray, params: ColorParams) -> np.ndarray:
    """Apply all operations of a view to uint8 [H, W, C], one after the other. Returns [H, W] for a grey view."""
    for operation, factor in params.jitter:
        image = _OPERATIONS[operation](image, factor)
    return _blur_and_solarize(grayscale(image) if params.gray else image, params)


def _blur_and_solarize(image: np.ndarray, params: ColorParams) -> np.ndarray:
    if params.sigma:
        image = blur(image, params.sigma)
    return solarize(image) if params.solarize else image


def _channels(image: np.ndarray) -> int:
    return image.shape[2] if image.ndim == 3 else 1


def _mean_luma(image: np.ndarray) -> float:
    channels = _channels(image)
    if channels > 4:  # cv2.mean supports four
        return float(image.mean())
    means = cv2.mean(image)
    if channels == 3:
        return LUMA[0] * means[0] + LUMA[1] * means[1] + LUMA[2] * means[2]
    return sum(means[:channels]) / channels


@functools.lru_cache(16)
def _hue_channel(shape: tuple[int, int, int]) -> np.ndarray:
    """1 in the first channel and 0 elsewhere.

    Adding whole arrays is six times as fast as adding to every third number.
    """
    array = np.zeros(shape, np.uint8)
    array[..., 0] = 1
    return array


# ---------------------------------------------------------------- modes fused and device
def color_row(params: ColorParams, channels: int) -> np.ndarray:
    """The parameters of the fused operations of one view, float32 [6]: own, luma, mean, angle, sigma, solarize.

    x → own · R(x) + luma · L(x) + mean · m, where L is the luma of a pixel, m its mean over the view, and R the
    rotation by `angle` (radians) around the grey axis; then a blur with `sigma`, and solarize if its value is 1. For
    other than three channels, luma and angle are 0 and m is the mean of all channels.
    """
    return np.array([*_combined(params, channels), params.sigma, params.solarize], np.float32)


def _combined(params: ColorParams, channels: int) -> tuple[float, float, float, float]:
    """(own, luma, mean, angle) of `color_row`."""
    own, luma, mean, angle = 1.0, 0.0, 0.0, 0.0
    for operation, f in params.jitter:
        if operation == "brightness":
            own, luma, mean = f * own, f * luma, f * mean
        elif operation == "contrast":
            own, luma, mean = f * own, f * luma, f * mean + (1 - f) * (own + luma + mean)
        elif channels != 3:
            continue
        elif operation == "saturation":
            own, luma = f * own, f * luma + (1 - f) * (own + luma)
        else:
            angle = 2 * math.pi * f
    if params.gray and channels == 3:
        own, luma = 0.0, own + luma
    return own, luma, mean, angle


def fused(image: np.ndarray, params: ColorParams) -> np.ndarray:
    """Apply all operations of a view to [H, W, C] of uint8, uint16 or float32, as one matrix. Returns [H, W] for a grey
    view. float32 is neither rounded nor cut off, and `solarize` does not change it."""
    channels, dtype = _channels(image), image.dtype
    if dtype == np.uint16:
        image = image.astype(np.float32)
    if params.jitter or params.gray:
        own, luma, mean, angle = _combined(params, channels)
        constant = mean * _mean_luma(image) if mean else 0.0
        if channels != 3:
            image = cv2.addWeighted(image, own, image, 0, constant)
        elif params.gray:
            image = cv2.extractChannel(cv2.transform(image, _matrix(0, luma, constant, 0)), 0)
        else:
            image = cv2.transform(image, _matrix(own, luma, constant, angle))
    if dtype == np.uint8:
        return _blur_and_solarize(image, params)
    image = rounded(image, dtype)
    if params.sigma:
        image = rounded(blur(image.astype(np.float32), params.sigma), dtype)
    return np.minimum(image, np.uint16(65535) - image) if params.solarize and dtype == np.uint16 else image


def _matrix(own: float, luma: float, constant: float, angle: float) -> np.ndarray:
    """The colour matrix [3, 4] of x → own · R(x) + luma · L(x) + constant."""
    parts = (own, own * math.cos(angle), own * math.sin(angle), luma, constant)
    return np.dot(parts, BASIS).reshape(3, 4)
