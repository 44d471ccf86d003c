"""Augmented views of an image on uint8 arrays: torchvision's recipes with OpenCV's colour operations and torch's antialiased uint8 resize.

Images come in as [H, W, 3] and go out as [3, H, W], uint8; normalisation happens on the device. Every random number comes from the generator
that the stream makes for (seed, epoch, sample), so a sample's views do not depend on the process that makes them.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F

_LUMA = np.array([0.299, 0.587, 0.114])
_SOLARIZE = np.where(np.arange(256) >= 128, 255 - np.arange(256), np.arange(256)).astype(np.uint8)


def random_box(
    shape: tuple[int, ...], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop with a share of the area in `scale` and an aspect in [3/4, 4/3]: RandomResizedCrop."""
    height, width = shape
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area, aspect = height * width * rng.uniform(*scale), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    if width / height < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialias, [H, W, 3] → [size, 3]; equals Pillow's. A dense crop keeps torch's kernel on its fast interleaved path."""
    if image.shape[:2] == tuple(size):
        return image
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return F.interpolate(tensor, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).contiguous().numpy()


def _channels_first(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def crop_and_flip(image: np.ndarray, size: int, rng: np.random.Generator, scale: tuple[float, float]) -> np.ndarray:
    """A random resized crop, mirrored half of the time: [3, size, size]."""
    top, left, h, w = random_box(image.shape[:2], scale, rng)
    out = resize(image[top : top + h, left : left + w], (size, size))
    return _channels_first(out[:, ::-1] if rng.random() < 0.5 else out)


def center(image: np.ndarray, size: int) -> np.ndarray:
    """What evaluation sees: the short side resized to `size`, the middle cropped: [3, size, size]."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return _channels_first(resize(image[top : top + short, left : left + short], (size, size)))


def _mix(own: float, luma: float, constant: float) -> np.ndarray:
    """The colour matrix of x → own · x + luma · grey(x) + constant, clipped to uint8 once."""
    matrix = np.empty((3, 4))
    matrix[:, :3], matrix[:, 3] = luma * _LUMA, constant
    matrix[[0, 1, 2], [0, 1, 2]] += own
    return matrix


def color_jitter(
    image: np.ndarray, strength: tuple[float, float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Brightness, contrast, saturation and hue in random order, each clipped to uint8, as torchvision's ColorJitter does."""
    brightness, contrast, saturation, hue = strength
    for operation in rng.permutation(4):
        if operation == 0:
            image = cv2.transform(image, _mix(rng.uniform(max(0, 1 - brightness), 1 + brightness), 0, 0))
        elif operation == 1:
            factor = rng.uniform(max(0, 1 - contrast), 1 + contrast)
            mean = float(np.dot(cv2.mean(image)[:3], _LUMA))
            image = cv2.transform(image, _mix(factor, 0, mean * (1 - factor)))
        elif operation == 2:
            factor = rng.uniform(max(0, 1 - saturation), 1 + saturation)
            image = cv2.transform(image, _mix(factor, 1 - factor, 0))
        elif hue:
            shift = int(rng.uniform(-hue, hue) * 255)
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            hsv[..., 0] += np.uint8(shift & 255)  # wraps around, as hue does
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


class Augment:
    """One view: random crop, flip, jitter (p 0.8), grey (p 0.2), blur, solarize; the order and numbers of SimCLR, BYOL and DINO."""

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        jitter: tuple[float, float, float, float],
        blur: float = 0.0,
        solarize: float = 0.0,
        gray: float = 0.2,
    ):
        self.size, self.scale, self.jitter, self.blur, self.solarize, self.gray = (
            size,
            scale,
            jitter,
            blur,
            solarize,
            gray,
        )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3] → uint8 [3, size, size]."""
        top, left, h, w = random_box(image.shape[:2], self.scale, rng)
        out = resize(image[top : top + h, left : left + w], (self.size, self.size))
        if rng.random() < 0.5:
            out = cv2.flip(out, 1)
        if rng.random() < 0.8:
            out = color_jitter(out, self.jitter, rng)
        if rng.random() < self.gray:
            out = cv2.transform(out, _mix(0, 1, 0))
        if rng.random() < self.blur:
            out = cv2.GaussianBlur(out, (9, 9), rng.uniform(0.1, 2.0), borderType=cv2.BORDER_REFLECT_101)
        if rng.random() < self.solarize:
            out = cv2.LUT(out, _SOLARIZE)
        return _channels_first(out)
