"""Augmented views of an image on uint8 arrays: torchvision's recipes with OpenCV's colour operations and torch's antialiased uint8 resize.

    params = augment.draw((H, W), rng(k))        the random numbers of view k, known from the image's size alone
    view   = augment.apply(pixels, params)       [H, W, C] → [C, size, size]
    crops(sample, {"image": augment}, rng)       the same for all views of a sample, from one decoding

Views are uint8; normalisation happens on the device. `rng(k)` is the generator of view k of a sample, which the stream makes for (seed, epoch, sample,
k): a view's parameters depend neither on the process that makes it nor on the sample's other views.

The colour operations come in three ways, which draw the same random numbers (`sample["color"]`):

    exact    torchvision's operations one by one, each rounded and clipped to uint8, on the whole image as it is stored
    fused    brightness, contrast, saturation, hue and grey as one matrix. With luma L(x), the first three and grey map x → a·x + b·L(x) + c, which
             compose as three numbers and commute with a hue rotation that keeps L. Differs by no clipping in between, and by hue turned in the
             chroma plane of YIQ, where torchvision turns it in HSV. And a JPEG is decoded no larger than the most demanding view needs: that
             leaves 0.92 of the detail (gradient energy) of views for which it is just large enough, which exact views do not lose
    device   as fused, but the matrix, blur and solarize are left to `data_pipeline/device_color.py`, which does them for a whole batch from the
             numbers returned beside the views

Images of other than three channels have no hue, saturation or grey: those operations leave them alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random.bit_generator import ISeedSequence

from data_pipeline.decode import Damaged, Encoded

Rng = Callable[[int], np.random.Generator]  # the generator of a sample's view of that number
MASKS = 1000  # views are numbered from 0, and masks from here, so that neither shifts the other
COLORS = ("exact", "fused", "device")
LUMA = (0.299, 0.587, 0.114)

# x → own · rotation(x) + luma · L(x) + constant, as a sum of [3, 4] matrices: of own, own · cos, own · sin (the rotation), luma and constant
_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
_IN_YIQ = np.array([np.diag([1, 0, 0]), np.diag([0, 1, 1]), [[0, 0, 0], [0, 0, 1], [0, -1, 0]]])
BASIS = np.zeros((5, 3, 4))
BASIS[:3, :, :3] = np.linalg.inv(_YIQ) @ _IN_YIQ @ _YIQ
BASIS[3, :, :3], BASIS[4, :, 3] = LUMA, 1
BASIS = BASIS.reshape(5, 12)


class _Key(ISeedSequence):
    """A key for Philox as it is. Given as `key=`, numpy gathers entropy for a seed that it then does without: two thirds of a generator's cost."""

    def __init__(self, key: tuple[int, int]):
        self.words = np.array(key, np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.words


def generators(key: tuple[int, int]) -> Rng:
    """The generators of a sample: number k is Philox with this key of two 64-bit words, from counter k · 2¹⁹² on."""
    words = _Key(key)
    return lambda number: np.random.Generator(np.random.Philox(words, counter=[0, 0, 0, number]))


class Params(NamedTuple):
    """The random numbers of one view."""

    shape: tuple[int, int]  # height and width of the image that the box lies in
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # (operation, factor) in their order; of hue, the part of a whole turn
    gray: bool
    sigma: float  # of the blur, in pixels of the view; 0 for none
    solarize: bool


@dataclass(frozen=True)
class Augment:
    """One view: random resized crop, flip, colour jitter, grey, blur, solarize; the order and numbers of SimCLR, BYOL and DINO."""

    size: int  # side of the view in pixels
    scale: tuple[float, float]  # range of the crop's share of the area
    flip: float = 0.5  # a probability, as all below but the strengths
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # of brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0

    @property
    def colors(self) -> bool:
        """Whether any operation after the flip can happen."""
        return bool((any(self.jitter) and self.jitter_p) or self.gray or self.blur or self.solarize)

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> Params:
        """The parameters of one view of an image of (height, width). Each decision has its own random number, whatever the probabilities."""
        u = rng.random(_BOX_NUMBERS + 14).tolist()
        box = _box(shape, self.scale, u)
        flip, jitter, gray, blur, sigma, solarize, *rest = u[_BOX_NUMBERS:]
        return Params(
            shape,
            box,
            flip < self.flip,
            self._draw_jitter(rest) if jitter < self.jitter_p else (),
            gray < self.gray,
            0.1 + 1.9 * sigma if blur < self.blur else 0.0,
            solarize < self.solarize,
        )

    def _draw_jitter(self, u: list[float]) -> tuple[tuple[str, float], ...]:
        """From 8 uniform numbers: the first four order the operations, the others say how much."""
        operations = []
        for place in sorted(range(4), key=u.__getitem__):
            strength, where = self.jitter[place], u[4 + place]
            if strength:
                low = -strength if place == 3 else max(0.0, 1 - strength)
                high = strength if place == 3 else 1 + strength
                operations.append((_JITTER[place], low + (high - low) * where))
        return tuple(operations)

    def apply(
        self, pixels: np.ndarray, params: Params, color: str = "exact", out: np.ndarray | None = None
    ) -> np.ndarray:
        """The view of pixels [H, W, C]: uint8 [C, size, size], in `out` where one is given.

        Where the pixels are of a smaller decoding than `params.shape` says, the box shrinks with them.
        """
        top, left, height, width = _scaled(params, pixels.shape[:2])
        image = resize(pixels[top : top + height, left : left + width], (self.size, self.size))
        if params.flip:
            image = cv2.flip(image, 1)
        if color == "exact":
            image = _exact(image, params)
        elif color == "fused":
            image = _fused(image, params)
        if out is None:
            out = np.empty((pixels.shape[2], self.size, self.size), np.uint8)
        if image.ndim == 2:  # one channel, or grey
            out[:] = image
        else:
            cv2.split(image, list(out))  # writes into the planes of `out`, in a third of the time of a transposed copy
        return out


def crops(
    sample: Mapping[str, Any],
    views: Mapping[str, Augment | Sequence[Augment]],
    rng: Rng,
    alike: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """All views of a sample, by name: uint8 [n, C, size, size] of a list of n augments, [C, size, size] of a single one, [0, C, 1, 1] of none.

    `sample["image"]` is an `Encoded` or uint8 [H, W, C]; of a video, a list of T such frames of one size: each gets the same crops and colours, and
    views have a T before C. `sample["color"]` is "exact" (also where there is no such key), "fused" or "device". The last returns, beside every entry
    that has colour operations, their parameters as "name.color": float32 [..., 6] with the entry's leading dimensions, see `color_row`.
    Views are numbered through in their order, for `rng`. `alike={"b": "a"}` gives the views of b the numbers of a's: the same boxes and flips.

    All boxes are drawn before the image is decoded, so that where colours are not exact, a JPEG is decoded at the smallest scale that keeps every box at
    or above the size of its view. Raises `Damaged`.
    """
    image, color = sample["image"], sample.get("color", "exact")
    if color not in COLORS:
        raise ValueError(f'color is "{color}"; it can be {", ".join(COLORS)}')
    clip = isinstance(image, (list, tuple))
    frames = image if clip else [image]
    shape, channels = _common_shape(frames)
    drawn = _draw(views, shape, rng, alike or {})
    out = {
        name: np.empty((len(entry), len(frames), *_size(name, entry, channels)), np.uint8)
        for name, entry in drawn.items()
    }
    shrink = 1.0
    if color != "exact":
        shrink = min((min(p.box[2:]) / a.size for entry in drawn.values() for a, p in entry), default=1.0)
    for t, frame in enumerate(frames):
        pixels = frame.pixels(shrink) if isinstance(frame, Encoded) else frame
        for name, entry in drawn.items():
            for n, (augment, params) in enumerate(entry):
                augment.apply(pixels, params, color, out[name][n, t])
    result = {}
    for name, entry in drawn.items():
        leading = (len(entry),) * isinstance(views[name], Sequence) + (len(frames),) * clip
        result[name] = out[name].reshape(*leading, *out[name].shape[2:])
        if color == "device" and any(augment.colors for augment, _ in entry):
            rows = np.stack([color_row(params, channels) for _, params in entry])
            result[f"{name}.color"] = rows.repeat(len(frames), axis=0).reshape(*leading, -1)
    return result


Drawn = dict[str, list[tuple[Augment, Params]]]


def _common_shape(frames: Sequence[Any]) -> tuple[tuple[int, int], int]:
    """((height, width), channels) of frames of one size."""
    found = {_frame_shape(frame) for frame in frames}
    if len(found) != 1:
        raise Damaged(f"holds frames of different sizes: {sorted(found)}" if found else "holds no frames")
    return found.pop()


def _frame_shape(frame: Any) -> tuple[tuple[int, int], int]:
    if isinstance(frame, Encoded):
        return frame.shape, frame.channels
    if frame.dtype != np.uint8 or frame.ndim != 3:
        raise ValueError(f"an image is {frame.dtype} {list(frame.shape)}; it must be uint8 [H, W, C]")
    return frame.shape[:2], frame.shape[2]


def _draw(
    views: Mapping[str, Augment | Sequence[Augment]], shape: tuple[int, int], rng: Rng, alike: Mapping[str, str]
) -> Drawn:
    """Every entry's augments with the parameters of their views, numbered through."""
    drawn: Drawn = {}
    first: dict[str, int] = {}
    number = 0
    for name, entry in views.items():
        augments = entry if isinstance(entry, Sequence) else [entry]
        first[name] = first[alike[name]] if name in alike else number
        number += 0 if name in alike else len(augments)
        drawn[name] = [(a, a.draw(shape, rng(first[name] + k))) for k, a in enumerate(augments)]
    return drawn


def _size(name: str, entry: list[tuple[Augment, Params]], channels: int) -> tuple[int, int, int]:
    """(channels, height, width) of an entry's views, which become one array."""
    sizes = {augment.size for augment, _ in entry} or {1}
    if len(sizes) > 1:
        raise ValueError(f'views "{name}" have sizes {sorted(sizes)}: give each size an entry of its own')
    size = sizes.pop()
    return channels, size, size


def _scaled(params: Params, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The box of `params` on the same picture at another size."""
    if shape == params.shape:
        return params.box
    (top, left, height, width), down, across = params.box, shape[0] / params.shape[0], shape[1] / params.shape[1]
    height, width = max(1, round(height * down)), max(1, round(width * across))
    return min(round(top * down), shape[0] - height), min(round(left * across), shape[1] - width), height, width


# ---------------------------------------------------------------- boxes and sizes
def random_box(
    shape: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop with a share of the area in `scale` and an aspect in [3/4, 4/3]: RandomResizedCrop."""
    return _box(shape, scale, rng.random(_BOX_NUMBERS).tolist())


_BOX_NUMBERS = 22  # what ten tries take; drawing them at once costs as much as drawing two singly


def _box(shape: tuple[int, int], scale: tuple[float, float], u: list[float]) -> tuple[int, int, int, int]:
    (height, width), (low, high) = shape, scale
    for i in range(2, _BOX_NUMBERS, 2):
        area, aspect = height * width * (low + (high - low) * u[i]), math.exp((2 * u[i + 1] - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[0] * (height - h + 1)), int(u[1] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialias, [H, W, C] → [size, C]; equals Pillow's. A dense crop keeps torch's kernel on its fast interleaved path."""
    if image.shape[:2] == tuple(size):
        return image
    dense = np.ascontiguousarray(image)
    dense = dense.reshape(1, *dense.shape)  # [None] would give a stride of 0, which takes torch off that path
    tensor = torch.from_numpy(dense).permute(0, 3, 1, 2)
    resized = F.interpolate(tensor, size=size, mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()[0])


def center(image: np.ndarray, size: int) -> np.ndarray:
    """What evaluation sees of [H, W, C]: the short side resized to `size`, the middle cropped: [C, size, size]."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = resize(image[top : top + short, left : left + short], (size, size))
    return np.ascontiguousarray(square.transpose(2, 0, 1))


# ---------------------------------------------------------------- colours one by one: [H, W, C], or grey as [H, W]
# torchvision and Pillow round these three down, OpenCV to the nearest: without this, views come out up to 1.5 levels brighter than the published ones.
# Half a level less a little, so that whole numbers stay what they are.
_DOWN = -0.498


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """factor · x."""
    return cv2.convertScaleAbs(image, alpha=factor, beta=_DOWN)  # the absolute value of -0.498 is 0, too


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean luma of the image, or from the mean of all its channels where they are not RGB."""
    constant = (1 - factor) * _mean_luma(image) + _DOWN
    if _channels(image) != 3:
        return cv2.addWeighted(image, factor, image, 0, constant)
    return cv2.transform(image, _matrix(factor, 0, constant, 0))  # two thirds of addWeighted's time


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from each pixel's luma."""
    return image if _channels(image) != 3 else cv2.transform(image, _matrix(factor, 1 - factor, _DOWN, 0))


def hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turned in HSV by `shift` of a whole turn, in steps of 1/256."""
    if _channels(image) != 3:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv += _hue_channel(hsv.shape) * np.uint8(int(shift * 255) & 255)  # wraps around, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Luma as [H, W], so that what follows has a third of the work."""
    return image if _channels(image) != 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian of at most 9 taps, mirrored at the edges; taps below 3e-5, of which none is seen in 8 bits, are left out.

    `sepFilter2D` takes half the time of `GaussianBlur`, and is nearer to the formula: its weights are not cut to 8 bits.
    """
    radius = min(4, int(sigma * math.sqrt(-2 * math.log(3e-5))))
    if not radius:
        return image
    weights = cv2.getGaussianKernel(2 * radius + 1, sigma)
    return cv2.sepFilter2D(image, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)


def solarize(image: np.ndarray) -> np.ndarray:
    """255 − x where x is 128 or more: the smaller of the two."""
    return cv2.min(image, cv2.bitwise_not(image))


_OPERATIONS = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
_JITTER = tuple(_OPERATIONS)


def _exact(image: np.ndarray, params: Params) -> np.ndarray:
    for operation, factor in params.jitter:
        image = _OPERATIONS[operation](image, factor)
    return _blur_and_solarize(grayscale(image) if params.gray else image, params)


def _blur_and_solarize(image: np.ndarray, params: Params) -> np.ndarray:
    if params.sigma:
        image = blur(image, params.sigma)
    return solarize(image) if params.solarize else image


def _channels(image: np.ndarray) -> int:
    return image.shape[2] if image.ndim == 3 else 1


def _mean_luma(image: np.ndarray) -> float:
    channels = _channels(image)
    if channels > 4:  # cv2.mean knows four
        return float(image.mean())
    means = cv2.mean(image)
    if channels == 3:
        return LUMA[0] * means[0] + LUMA[1] * means[1] + LUMA[2] * means[2]
    return sum(means[:channels]) / channels


@functools.lru_cache(16)
def _hue_channel(shape: tuple[int, int, int]) -> np.ndarray:
    """1 in the first channel and 0 elsewhere: adding whole arrays is six times as fast as adding to every third number."""
    array = np.zeros(shape, np.uint8)
    array[..., 0] = 1
    return array


# ---------------------------------------------------------------- colours fused
def color_row(params: Params, channels: int) -> np.ndarray:
    """The fused operations of one view, float32 [6]: own, luma, mean, angle, sigma, solarize.

    x → own · R(x) + luma · L(x) + mean · m, with L a pixel's luma, m its mean over the view, R the turn by `angle` (radians) around the grey axis;
    then the blur and 1 for solarize. Of other than three channels, luma and angle are 0, and m is the mean of all channels.
    """
    return np.array([*_combined(params, channels), params.sigma, params.solarize], np.float32)


def _combined(params: Params, channels: int) -> tuple[float, float, float, float]:
    """Own, luma, mean and angle."""
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


def _fused(image: np.ndarray, params: Params) -> np.ndarray:
    channels = _channels(image)
    if params.jitter or params.gray:
        own, luma, mean, angle = _combined(params, channels)
        constant = mean * _mean_luma(image) if mean else 0.0
        if channels != 3:
            image = cv2.addWeighted(image, own, image, 0, constant)
        elif params.gray:
            image = cv2.extractChannel(cv2.transform(image, _matrix(0, luma, constant, 0)), 0)
        else:
            image = cv2.transform(image, _matrix(own, luma, constant, angle))
    return _blur_and_solarize(image, params)


def _matrix(own: float, luma: float, constant: float, angle: float) -> np.ndarray:
    """The colour matrix [3, 4] of x → own · R(x) + luma · L(x) + constant."""
    parts = (own, own * math.cos(angle), own * math.sin(angle), luma, constant)
    return np.dot(parts, BASIS).reshape(3, 4)
