"""Views of an image together with a map of numbers, one for each pixel.

Shapes: H × W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from data_pipeline.views.augmentations import Rng, resize


def class_map(values: np.ndarray, ignore: Sequence[int], zero_is_void: bool, ignored: int) -> np.ndarray:
    """The classes of pixels, int32 [H, W], from the numbers in a mask: `ignored` for the numbers in `ignore`.
    `zero_is_void`: also for number 0, and class n has the number n + 1, as in ADE20K."""
    out = values.astype(np.int32) - int(zero_is_void)
    out[np.isin(values, ignore) | (out < 0)] = ignored
    return out


def resized(image: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image (bicubic, antialiased) and its map (nearest) resized to `shape`."""
    values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
    return resize(image, shape), cv2.resize(values, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def short_side(image: np.ndarray, size: int) -> tuple[int, int]:
    """(height, width) of an image whose short side is resized to `size`."""
    height, width = image.shape[:2]
    factor = size / min(height, width)
    return max(size, round(height * factor)), max(size, round(width * factor))


def random_crop(
    image: np.ndarray, values: np.ndarray, size: tuple[int, int], zoom: tuple[float, float], fill: float, rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """A training view: the image is scaled so that its short side is the shorter one of `size` times a factor in `zoom`;
    a random crop of `size` is taken, and flipped with probability 0.5. Where the scaled image is smaller, the crop is
    padded, with `fill` in the map. Returns (uint8 [C, *size], map [*size])."""
    factor, top, left, flip = rng(0).random(4)
    target = short_side(image, max(1, round(min(size) * (zoom[0] + (zoom[1] - zoom[0]) * factor))))
    image, values = resized(image, values, target)
    missing = [max(0, wanted - present) for wanted, present in zip(size, image.shape, strict=False)]
    if any(missing):
        image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)))
        values = np.pad(values, ((0, missing[0]), (0, missing[1])), constant_values=fill)
    y, x = (int(u * (have - want + 1)) for u, have, want in zip((top, left), image.shape, size, strict=False))
    image, values = image[y : y + size[0], x : x + size[1]], values[y : y + size[0], x : x + size[1]]
    if flip < 0.5:
        image, values = image[:, ::-1], values[:, ::-1]
    return np.ascontiguousarray(image.transpose(2, 0, 1)), np.ascontiguousarray(values)
