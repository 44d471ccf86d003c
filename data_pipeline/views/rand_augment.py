"""Augmentations of supervised training, on uint8 views: RandAugment and random erasing, with the operations and numbers
of the recipes with which DeiT, BEiT and MAE are trained (timm's `rand-m9-mstd0.5-inc1`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.formats.pixels import rounded, top_level

LAYERS = 2  # operations that are drawn for a view
PROBABILITY = 0.5  # that a drawn operation is applied
SPREAD = 0.5  # standard deviation of the magnitude
MAX_MAGNITUDE = 10.0
ERASED_SHARE, ERASED_ASPECT = (
    (0.02, 1 / 3),
    (0.3, 1 / 0.3),
)  # of the erased rectangle: share of the area, height / width
ATTEMPTS = 10  # to draw a rectangle that lies within the view

Fill = tuple[int, ...]  # the colour of what comes into the view from outside
# (image, strength from 0 to 1, its sign, colour from outside) → image
Operation = Callable[[Image.Image, float, float, Fill], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _rotate(image: Image.Image, strength: float, sign: float, fill: Fill) -> Image.Image:
    return image.rotate(sign * strength * 30.0, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, strength: float, sign: float, fill: Fill) -> Image.Image:
    """Only the highest bits of a level are kept, from 4 down to none."""
    lost = 4 + int(strength * 4)
    return image.point([level >> lost << lost for level in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, strength: float, sign: float, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - min(256, int(strength * 256)))


def _solarize_add(image: Image.Image, strength: float, sign: float, fill: Fill) -> Image.Image:
    """Pixels below 128 become brighter."""
    added = int(strength * 110)
    table = [min(255, level + added) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


def _enhanced(enhance: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """An operation that moves the image away from, or towards, its version without colour, contrast, …"""

    def operation(image: Image.Image, strength: float, sign: float, fill: Fill) -> Image.Image:
        return enhance(image).enhance(max(0.1, 1.0 + sign * strength * 0.9))

    return operation


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, strength, sign, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign, fill: ImageOps.equalize(image),
    "invert": lambda image, strength, sign, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, strength, sign, fill: _affine(image, (1, sign * strength * 0.3, 0, 0, 1, 0), fill),
    "shear_y": lambda image, strength, sign, fill: _affine(image, (1, 0, 0, sign * strength * 0.3, 1, 0), fill),
    "translate_x": lambda image, strength, sign, fill: _affine(
        image, (1, 0, sign * strength * 0.45 * image.width, 0, 1, 0), fill
    ),
    "translate_y": lambda image, strength, sign, fill: _affine(
        image, (1, 0, 0, 0, 1, sign * strength * 0.45 * image.height), fill
    ),
}
_NAMES = tuple(OPERATIONS)


class RandAugment:
    """RandAugment (arXiv 1909.13719): two operations, drawn with replacement from OPERATIONS. Each is applied with
    probability 0.5, at a magnitude that is normal around `magnitude` and is cut off at 0 and 10.

    `mean`: of the training pixels on a scale from 0 to 1, the colour of what comes into the view from outside.
    """

    def __init__(self, magnitude: float, mean: Sequence[float]):
        self.magnitude = magnitude
        self.fill = tuple(min(255, round(255 * value)) for value in mean)

    def __call__(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An augmented copy of a view uint8 [3, S, S]."""
        image = Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))
        for _ in range(LAYERS):
            number, applied, sign = rng.random(3)
            magnitude = min(max(0.0, self.magnitude + SPREAD * rng.standard_normal()), MAX_MAGNITUDE)
            if applied < PROBABILITY:
                operation = OPERATIONS[_NAMES[int(number * len(_NAMES))]]
                image = operation(image, magnitude / MAX_MAGNITUDE, 1.0 if sign < 0.5 else -1.0, self.fill)
        return np.asarray(image).transpose(2, 0, 1)


def erased(
    view: np.ndarray, probability: float, mean: Sequence[float], std: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """A view [C, S, S] of uint8, uint16 or float32, in a copy of which, with this probability, a rectangle is replaced by
    noise (random erasing, arXiv 1708.04896).

    Each number of the noise is normal with the mean and the standard deviation of the training pixels, as in the
    published recipes, where it replaces normalised pixels; here it is rounded and cut off to the dtype of the view.
    """
    side = view.shape[1]
    if rng.random() >= probability:
        return view
    for _ in range(ATTEMPTS):
        area = side * side * rng.uniform(*ERASED_SHARE)
        aspect = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
            noise = rng.standard_normal((len(view), height, width), np.float32)
            center, spread = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (mean, std))
            out = view.copy()
            drawn = top_level(view.dtype) * (center + spread * noise)
            out[:, top : top + height, left : left + width] = rounded(drawn, view.dtype)
            return out
    return view
