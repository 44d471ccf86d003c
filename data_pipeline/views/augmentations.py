"""Augmented views of an image: torchvision's recipes, with OpenCV's colour operations and torch's antialiased resize.

    params = augment.draw((H, W), rng(k))        the random parameters of view k, which depend on the image's size only
    view   = augment.apply(pixels, params)       [H, W, C] → [C, size, size]
    crops(sample, {"image": augment}, rng)       both for all views of a sample, with the image decoded once

Views have the dtype of the image: uint8, uint16 or float32 (`data.pixel_dtype`); normalisation happens on the device.
`rng(k)` is the generator of view k of a sample, which the stream makes for (seed, epoch, sample, k): a view's parameters
depend neither on the process that makes it nor on the sample's other views.

The colour operations are in `data_pipeline/views/colors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random.bit_generator import ISeedSequence

from common.errors import Damaged
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.pixels import PIXEL_DTYPES, rounded
from data_pipeline.views import colors

Rng = Callable[[int], np.random.Generator]  # number of a view -> its generator
# The number of the generator of the first mask. Views are numbered from 0, so that more views do not change the masks.
MASKS = 1000


class _KeySequence(ISeedSequence):
    """A seed sequence that consists of the key of Philox.

    With `Philox(key=…)`, numpy also gathers entropy for a seed that is not used, which takes two thirds of the time.
    """

    def __init__(self, key: tuple[int, int]):
        self.words = np.array(key, np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.words


def generators(key: tuple[int, int]) -> Rng:
    """The generators of a sample, as a function of k: Philox with `key`, two 64-bit words, and the counter k · 2¹⁹²."""
    sequence = _KeySequence(key)
    return lambda number: np.random.Generator(np.random.Philox(sequence, counter=[0, 0, 0, number]))


class Params(NamedTuple):
    """The random parameters of one view."""

    shape: tuple[int, int]  # height and width of the image that the box refers to
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    # (operation, factor) in the order of application; for hue, the factor is a part of a full turn
    jitter: tuple[tuple[str, float], ...]
    gray: bool
    sigma: float  # of the blur, in pixels of the view; 0 for none
    solarize: bool


@dataclass(frozen=True)
class Augment:
    """One view: random resized crop, flip, colour jitter, grey, blur, solarize; the order and numbers of SimCLR, BYOL
    and DINO.
    """

    size: int  # side of the view in pixels
    scale: tuple[float, float]  # range of the crop's share of the image's area
    flip: float = 0.5  # a probability, like jitter_p, gray, blur and solarize
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # strengths: brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0

    @property
    def colors(self) -> bool:
        """Whether any colour operation has a probability above 0."""
        return bool((any(self.jitter) and self.jitter_p) or self.gray or self.blur or self.solarize)

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> Params:
        """Draw the parameters of one view of an image of (height, width).

        Each decision uses its own random number, also if its probability is 0.
        """
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
        """The jitter from 8 uniform numbers: the first four determine the order of the operations, the others their
        factors.
        """
        operations = []
        for n in sorted(range(4), key=u.__getitem__):
            strength = self.jitter[n]
            if strength:
                is_hue = n == 3
                low = -strength if is_hue else max(0.0, 1 - strength)
                high = strength if is_hue else 1 + strength
                operations.append((colors.JITTER[n], low + (high - low) * u[4 + n]))
        return tuple(operations)

    def apply(
        self, pixels: np.ndarray, params: Params, color: str = "exact", out: np.ndarray | None = None
    ) -> np.ndarray:
        """The view of pixels [H, W, C]: [C, size, size] of the same dtype, written to `out` if it is given.

        If the image was decoded at a smaller size than `params.shape`, the box is scaled accordingly.
        """
        top, left, height, width = _scaled(params, pixels.shape[:2])
        image = resize(pixels[top : top + height, left : left + width], (self.size, self.size))
        if params.flip:
            image = cv2.flip(image, 1)
        if color != "device":
            apply = colors.exact if color == "exact" and image.dtype == np.uint8 else colors.fused
            image = apply(image, params)
        if out is None:
            out = np.empty((pixels.shape[2], self.size, self.size), pixels.dtype)
        if image.ndim == 2:  # one channel, or grey
            out[:] = image
        else:
            cv2.split(image, list(out))  # takes a third of the time of a transposed copy
        return out


def crops(
    sample: Mapping[str, Any],
    views: Mapping[str, Augment | Sequence[Augment]],
    rng: Rng,
    same_crops: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """All views of a sample, by name: [C, size, size] for a single augment, [n, C, size, size] for a list of n,
    [0, C, 1, 1] for an empty list.

    `sample["image"]` is an `Encoded` or [H, W, C] of uint8, uint16 or float32, which the views have, too; for a video,
    a list of T such frames of one size. All frames get the same crops and colours, and views have a dimension T before C.
    `sample["color"]`, or else the image's `color`, is "exact" (the default), "fused" or "device". With "device", every entry "name" with colour operations is
    accompanied by their parameters "name.color": float32 [..., 6] with the leading dimensions of the entry, see
    `colors.color_row`. For `rng`, views are numbered in the order of the entries. `same_crops={"b": "a"}` gives the
    views of b the same numbers as the views of a, and therefore the same boxes and flips.

    All boxes are drawn before the image is decoded. So, if colours are not exact, a JPEG can be decoded at the smallest
    scale at which every box is at least as large as its view. Raises `Damaged`.
    """
    image = sample["image"]
    clip = isinstance(image, (list, tuple))
    frames = image if clip else [image]
    color = sample.get("color") or getattr(frames[0] if frames else None, "color", "exact")
    if color not in colors.MODES:
        raise ValueError(f'color is "{color}"; it can be {", ".join(colors.MODES)}')
    shape, channels, dtype = _common_shape(frames)
    drawn = _draw(views, shape, rng, same_crops or {})
    out = {
        name: np.empty((len(entry), len(frames), *_size(name, entry, channels)), dtype)  # [n, T, C, size, size]
        for name, entry in drawn.items()
    }
    shrink = 1.0
    if color != "exact":
        shrink = min((min(p.box[2:]) / a.size for entry in drawn.values() for a, p in entry), default=1.0)
    for t, frame in enumerate(frames):
        if t and frame is frames[t - 1]:  # a still image as a video, or one with fewer frames than its clip
            for views_of_frames in out.values():
                views_of_frames[:, t] = views_of_frames[:, t - 1]
            continue
        pixels = frame.pixels(shrink) if isinstance(frame, Encoded) else frame
        for name, entry in drawn.items():
            for n, (augment, params) in enumerate(entry):
                augment.apply(pixels, params, color, out[name][n, t])
    result = {}
    for name, entry in drawn.items():
        is_list = isinstance(views[name], Sequence)
        leading = (*([len(entry)] if is_list else []), *([len(frames)] if clip else []))
        result[name] = out[name].reshape(*leading, *out[name].shape[2:])
        if color == "device" and any(augment.colors for augment, _ in entry):
            rows = np.stack([colors.color_row(params, channels) for _, params in entry])  # [n, 6]
            result[f"{name}.color"] = rows.repeat(len(frames), axis=0).reshape(*leading, -1)
    return result


Drawn = dict[str, list[tuple[Augment, Params]]]


def _common_shape(frames: Sequence[Any]) -> tuple[tuple[int, int], int, str]:
    """((height, width), channels, dtype) of the frames. Raises `Damaged` if they differ."""
    shapes = {_frame_shape(frame) for frame in frames}
    if len(shapes) != 1:
        raise Damaged(f"holds frames of different sizes: {sorted(shapes)}" if shapes else "holds no frames")
    return shapes.pop()


def _frame_shape(frame: Any) -> tuple[tuple[int, int], int, str]:
    if isinstance(frame, Encoded):
        return frame.shape, frame.channels, frame.dtype
    if frame.dtype.name not in PIXEL_DTYPES or frame.ndim != 3:
        raise ValueError(
            f"an image is {frame.dtype} {list(frame.shape)}; it must be [H, W, C] of {', '.join(PIXEL_DTYPES)}"
        )
    return frame.shape[:2], frame.shape[2], frame.dtype.name


def _draw(
    views: Mapping[str, Augment | Sequence[Augment]], shape: tuple[int, int], rng: Rng, same_crops: Mapping[str, str]
) -> Drawn:
    """The augments of every entry, with the parameters of their views. See `crops` for the numbers of the views."""
    drawn: Drawn = {}
    first: dict[str, int] = {}  # the number of the first view of each entry
    next_number = 0
    for name, entry in views.items():
        augments = entry if isinstance(entry, Sequence) else [entry]
        if name in same_crops:
            first[name] = first[same_crops[name]]
        else:
            first[name] = next_number
            next_number += len(augments)
        drawn[name] = [(a, a.draw(shape, rng(first[name] + k))) for k, a in enumerate(augments)]
    return drawn


def _size(name: str, entry: list[tuple[Augment, Params]], channels: int) -> tuple[int, int, int]:
    """(channels, height, width) of the views of an entry. Raises ValueError if their sizes differ."""
    sizes = {augment.size for augment, _ in entry} or {1}
    if len(sizes) > 1:
        raise ValueError(f'views "{name}" have sizes {sorted(sizes)}: give each size an entry of its own')
    size = sizes.pop()
    return channels, size, size


def _scaled(params: Params, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The box of `params` on the same image decoded at another size."""
    if shape == params.shape:
        return params.box
    top, left, height, width = params.box
    vertical, horizontal = shape[0] / params.shape[0], shape[1] / params.shape[1]
    height, width = max(1, round(height * vertical)), max(1, round(width * horizontal))
    return min(round(top * vertical), shape[0] - height), min(round(left * horizontal), shape[1] - width), height, width


# ---------------------------------------------------------------- boxes and sizes
def random_box(
    shape: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop with a share of the area in `scale` and an aspect in [3/4, 4/3]:
    RandomResizedCrop.
    """
    return _box(shape, scale, rng.random(_BOX_NUMBERS).tolist())


# Random numbers for a box: two for its position, and two for each of ten attempts at its size. Drawing all of them at
# once takes as long as drawing two one by one.
_BOX_NUMBERS = 22


def _box(shape: tuple[int, int], scale: tuple[float, float], u: list[float]) -> tuple[int, int, int, int]:
    """`random_box` from uniform random numbers `u`. If no attempt fits, the largest central box of a valid aspect."""
    (height, width), (low, high) = shape, scale
    for i in range(2, _BOX_NUMBERS, 2):
        area = height * width * (low + (high - low) * u[i])
        aspect = math.exp((2 * u[i + 1] - 1) * math.log(4 / 3))
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
    """Resize [H, W, C] to [*size, C] of the same dtype, bicubic with antialiasing. Equals Pillow's result for uint8."""
    if image.shape[:2] == tuple(size):
        return image
    if image.dtype == np.uint8 and image.shape[2] > 4:  # torch's fast kernel for bytes takes up to four channels
        return np.concatenate([resize(image[..., n : n + 4], size) for n in range(0, image.shape[2], 4)], axis=2)
    # torch has a fast kernel for interleaved channels, which it uses only for a contiguous array. Therefore reshape,
    # and not [None], whose stride is 0.
    dense = np.ascontiguousarray(image)
    dense = dense.reshape(1, *dense.shape)  # [1, H, W, C]
    tensor = torch.from_numpy(dense).permute(0, 3, 1, 2)  # [1, C, H, W]
    if image.dtype == np.uint16:  # which `interpolate` does not support
        tensor = tensor.float()
    resized = F.interpolate(tensor, size=size, mode="bicubic", antialias=True)
    return rounded(np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy()[0]), image.dtype)


def center(image: np.ndarray, size: int) -> np.ndarray:
    """The view for evaluation: the central square of [H, W, C] resized to [C, size, size]."""
    return spaced_squares(image, size, 1)[0]


def spaced_squares(image: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """`count` squares of the height or the width of [H, W, C], evenly spaced from one end of the longer side to the other
    (one: in the middle), each resized to [C, size, size]."""
    height, width = image.shape[:2]
    short = min(height, width)
    rest, out = np.array([height - short, width - short]), []
    for place in np.linspace(0, 1, count) if count > 1 else (0.5,):
        top, left = (rest * place).astype(int)
        square = resize(image[top : top + short, left : left + short], (size, size))
        out.append(np.ascontiguousarray(square.transpose(2, 0, 1)))
    return out
