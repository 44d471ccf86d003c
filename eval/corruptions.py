"""The 15 corruptions of ImageNet-C at 5 levels (arXiv 1903.12261), made here, so that no images are downloaded.

An image is uint8 RGB [224, 224, 3], the size for which the published strengths are meant. `corrupt(image, name, level,
rng)` returns such an image. Noise, blurs, brightness, contrast, pixelation and JPEG follow the published formulas and
strengths. Four differ, because the originals need photographs or change pixels one by one, so scores for them differ from
those for the published files: frost draws crystals in place of photographs of ice, snow and fog use other random
textures, and glass blur moves all pixels at once.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

SIZE = 224
Rng = np.random.Generator
Corruption = Callable[[np.ndarray, int, Rng], np.ndarray]  # (float image in 0…1, level from 0, rng) → float image


def gaussian_noise(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    return x + rng.normal(size=x.shape, scale=(0.08, 0.12, 0.18, 0.26, 0.38)[level])


def shot_noise(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    photons = (60, 25, 12, 5, 3)[level]
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    """Salt and pepper, in equal shares."""
    share, u = (0.03, 0.06, 0.09, 0.17, 0.27)[level], rng.random(x.shape)
    return np.where(u < share / 2, 0.0, np.where(u < share, 1.0, x))


def defocus_blur(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    radius, sigma = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level]
    return cv2.filter2D(x, -1, _disk(radius, sigma))


def glass_blur(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[level]
    x = _gaussian(x, sigma)
    rows, columns = np.mgrid[: x.shape[0], : x.shape[1]]
    for _ in range(rounds):
        dy, dx = rng.integers(-reach, reach, (2, *rows.shape))
        x = x[(rows + dy).clip(0, x.shape[0] - 1), (columns + dx).clip(0, x.shape[1] - 1)]
    return _gaussian(x, sigma)


def motion_blur(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    return _motion(x, radius, sigma, rng.uniform(-45, 45))


def zoom_blur(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    last, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[level]
    factors = np.arange(1, last, step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    mean, std, zoom, threshold, radius, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[level]
    flakes = _zoomed(rng.normal(size=x.shape[:2], loc=mean, scale=std), zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _motion(flakes.astype(np.float32), radius, sigma, rng.uniform(-135, -45))[..., None]
    gray = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2GRAY)[..., None]
    return share * x + (1 - share) * np.maximum(x, gray * 1.5 + 0.5) + flakes + flakes[::-1, ::-1]


def frost(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    of_image, of_ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[level]
    return of_image * x + of_ice * _ice(x.shape[0], rng)


def fog(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    strength, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[level]
    brightest = x.max()
    x = x + strength * plasma(256, decay, rng)[: x.shape[0], : x.shape[1], None]
    return x * brightest / (brightest + strength)


def brightness(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    hsv = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 2] = (hsv[..., 2] + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clip(0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def contrast(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def elastic_transform(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    amount, sigma, affine = (
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    )[level]
    height, width = x.shape[:2]
    middle, part = np.array([width, height], np.float32) / 2, min(height, width) // 3
    corners = np.array([middle + part, [middle[0] + part, middle[1] - part], middle - part], np.float32)
    moved = corners + rng.uniform(-affine, affine, (3, 2)).astype(np.float32)
    x = cv2.warpAffine(x, cv2.getAffineTransform(corners, moved), (width, height), borderMode=cv2.BORDER_REFLECT_101)
    shifts = [amount * _gaussian(rng.uniform(-1, 1, (height, width)), sigma, 3.0) for _ in range(2)]
    rows, columns = np.mgrid[:height, :width]
    at_x, at_y = ((grid + shift).astype(np.float32) for grid, shift in zip((columns, rows), shifts, strict=True))
    return cv2.remap(x.astype(np.float32), at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def pixelate(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    share, (height, width) = (0.6, 0.5, 0.4, 0.3, 0.25)[level], x.shape[:2]
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    small = image.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x: np.ndarray, level: int, rng: Rng) -> np.ndarray:
    quality = (25, 18, 15, 10, 7)[level]
    pixels = np.ascontiguousarray((x * 255).round().astype(np.uint8)[..., ::-1])
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1] / 255


# {name: (corruption, the error of AlexNet for it, by which the mean corruption error is normalised)}
CORRUPTIONS: dict[str, tuple[Corruption, float]] = {
    "gaussian_noise": (gaussian_noise, 0.886428),
    "shot_noise": (shot_noise, 0.894468),
    "impulse_noise": (impulse_noise, 0.922640),
    "defocus_blur": (defocus_blur, 0.819880),
    "glass_blur": (glass_blur, 0.826268),
    "motion_blur": (motion_blur, 0.785948),
    "zoom_blur": (zoom_blur, 0.798360),
    "snow": (snow, 0.866816),
    "frost": (frost, 0.826572),
    "fog": (fog, 0.819324),
    "brightness": (brightness, 0.564592),
    "contrast": (contrast, 0.853204),
    "elastic_transform": (elastic_transform, 0.646056),
    "pixelate": (pixelate, 0.717840),
    "jpeg_compression": (jpeg_compression, 0.606500),
}


def corrupt(image: np.ndarray, name: str, level: int, rng: Rng) -> np.ndarray:
    """An image uint8 [H, W, 3] with a corruption of a level from 1 to 5."""
    x = CORRUPTIONS[name][0](image.astype(np.float64) / 255, level - 1, rng)
    return (x.clip(0, 1) * 255).round().astype(np.uint8)


# ---------------------------------------------------------------- filters and textures
def _gaussian(x: np.ndarray, sigma: float, truncate: float = 4.0) -> np.ndarray:
    side = 2 * int(truncate * sigma + 0.5) + 1
    return cv2.GaussianBlur(x, (side, side), sigma, borderType=cv2.BORDER_REFLECT)


def _disk(radius: int, sigma: float) -> np.ndarray:
    """A disk whose edge is smoothed, with sum 1."""
    half = max(8, radius)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    side = 3 if radius <= 8 else 5
    return cv2.GaussianBlur(disk / disk.sum(), (side, side), sigma)


def _motion(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """The image, blurred in one direction with the weights exp(−i² / 2σ²) of pixels at a distance i."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    kernel, angle = np.zeros((4 * radius + 1, 4 * radius + 1)), math.radians(degrees)
    for i, weight in enumerate(weights / weights.sum()):
        kernel[2 * radius + round(i * math.sin(angle)), 2 * radius + round(i * math.cos(angle))] += weight
    return cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The center of the image, enlarged to its size."""
    height, width = x.shape[:2]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    return cv2.resize(x[top : top + h, left : left + w], (width, height), interpolation=cv2.INTER_LINEAR)


def plasma(side: int, decay: float, rng: Rng) -> np.ndarray:
    """A cloudy texture [side, side] in 0…1, by the diamond-square algorithm; `side` is a power of two. The random
    displacement is divided by `decay` whenever the squares get half as large."""
    out, step, amount = np.zeros((side, side)), side, 100.0

    def displaced(sums: np.ndarray) -> np.ndarray:
        return sums / 4 + amount * rng.uniform(-1, 1, sums.shape)

    while step > 1:
        half = step // 2
        corners = out[::step, ::step]
        sums = corners + np.roll(corners, -1, 0)
        out[half::step, half::step] = displaced(sums + np.roll(sums, -1, 1))
        middles = out[half::step, half::step]
        out[::step, half::step] = displaced(corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0))
        out[half::step, ::step] = displaced(corners + np.roll(corners, -1, 0) + middles + np.roll(middles, 1, 1))
        step, amount = half, amount / decay
    out -= out.min()
    return out / out.max()


def _ice(side: int, rng: Rng) -> np.ndarray:
    """A texture of bluish white crystals [side, side, 3] in 0…1: needles that grow in random directions over a cloud."""
    canvas = np.zeros((side, side), np.float32)
    for _ in range(60):
        at, angle = rng.uniform(0, side, 2), rng.uniform(0, 2 * math.pi)
        for turn in (0.0, math.pi / 3, -math.pi / 3):
            end = at + rng.uniform(0.05, 0.3) * side * np.array([math.cos(angle + turn), math.sin(angle + turn)])
            cv2.line(
                canvas, at.astype(int).tolist(), end.astype(int).tolist(), float(rng.uniform(0.4, 1)), 1, cv2.LINE_AA
            )
    cloud = plasma(256, 1.6, rng)[:side, :side]
    ice = (0.6 * _gaussian(canvas, 0.7) + 0.7 * cloud).clip(0, 1)
    return ice[..., None] * np.array(colorsys.hsv_to_rgb(0.56, 0.15, 1.0))
