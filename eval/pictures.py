"""Pictures for the report: images, patches and curves.

Patch features become colours: their first three principal components are red, green and blue, as in DINOv2 (arXiv
2304.07193). Shapes: N images, M mosaics, S pixels per image side, h × w patches, D features.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.errors import Damaged, DataError
from data_pipeline.formats.pixels import PixelDtype, picture
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center
from eval.features import Encoder

Series = dict[str, tuple[list[float], list[float]]]  # {name: (steps, values)}
SI_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PREFIXED_UNITS = ("FLOP/s", "B")  # the prefix is written before these units, and after the number for other units
MAX_CHART_POINTS = 400
Labels = Sequence[str | None]  # None for an image without a label


def load_some(
    samples: Samples, limit: int, size: int, channels: int = 3, dtype: PixelDtype = "uint8"
) -> tuple[np.ndarray, Labels, list[int]]:
    """(center crops `dtype` [N, channels, S, S], labels, numbers of the samples) of up to `limit` images that are evenly
    spaced over the set. Damaged images are left out. Raises DataError if none can be read, or the store cannot."""
    images, labels, numbers = [], list[str | None](), []
    for number in np.linspace(0, len(samples) - 1, min(limit, len(samples))).round().astype(int).tolist():
        try:
            image = center(samples.image(number, channels, dtype=dtype), size)
        except Damaged:
            continue
        try:
            label = samples.label(number)
        except (Damaged, DataError):
            label = None
        images.append(image)
        labels.append(label)
        numbers.append(number)
    if not images:
        raise DataError(f"{samples.names}: none of the images that were tried can be read")
    return np.stack(images), labels, numbers


def spread(labels: Labels, groups: int, each: int) -> list[list[int]]:
    """Choose `groups` groups of `each` images: the numbers of their images. The images of a group are of one class, and
    evenly spaced. The groups are of different classes, as long as there are enough classes.

    Classes with fewer than `each` images are not used. If no class has so many, or if there are no labels, all images
    count as one class.
    """
    classes: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        classes.setdefault(label or "", []).append(number)
    usable = [classes[name] for name in sorted(classes) if len(classes[name]) >= each] or [list(range(len(labels)))]
    if len(usable) > groups:
        usable = [usable[i * len(usable) // groups] for i in range(groups)]
    groups_per_class = -(-groups // len(usable))
    # A class is divided into so many parts, one for each image of each of its groups. A group takes the middle images
    # of every `groups_per_class`-th part.
    parts = each * groups_per_class
    out = []
    for group in range(groups):
        nth_of_class, images = group // len(usable), usable[group % len(usable)]
        chosen_parts = [nth_of_class + j * groups_per_class for j in range(each)]
        out.append([images[(2 * part + 1) * len(images) // (2 * parts)] for part in chosen_parts])
    return out


def mosaic(images: np.ndarray, edge: int = 4) -> np.ndarray:
    """[edge·edge, C, S, S] → [C, edge·S, edge·S], row by row."""
    rows = images.reshape(edge, edge, *images.shape[1:]).transpose(2, 0, 3, 1, 4)  # [C, edge, S, edge, S]
    return rows.reshape(images.shape[1], edge * images.shape[2], edge * images.shape[3])


def patch_features(encoder: Encoder, image: np.ndarray) -> np.ndarray:
    """Features [h, w, D] of the patches of an image [C, H, W], at its full resolution."""
    features = encoder(image[None])
    return features.tokens[0].unflatten(0, features.grid).float().cpu().numpy()


def pca_colors(features: np.ndarray) -> np.ndarray:
    """Patch features [M, h, w, D] as colours, uint8 [M, h, w, 3], see `joint_colors`."""
    return np.stack(joint_colors([*features]))


def joint_colors(features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Patch features [h, w, D] of inputs of any sizes as colours, uint8 [h, w, 3] each: their first three principal
    components, computed for all patches together.

    The arbitrary sign of a component is chosen so that its largest loading is positive. Its 2nd and 98th percentiles
    become 0 and 255.
    """
    flat = np.concatenate([each.reshape(-1, each.shape[-1]) for each in features]).astype(np.float64)
    flat = np.nan_to_num(flat)
    flat -= flat.mean(0)
    vectors = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :3]  # [D, 3]; eigh sorts eigenvalues in ascending order
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0))
    values = flat @ vectors
    low, high = np.percentile(values, [2, 98], axis=0)
    colors = ((values - low) / np.maximum(high - low, 1e-12) * 255).clip(0, 255).round().astype(np.uint8)
    colors = np.pad(colors, ((0, 0), (0, 3 - colors.shape[1])))
    ends = np.cumsum([each.shape[0] * each.shape[1] for each in features])[:-1]
    parts = np.split(colors, ends)
    return [part.reshape(*each.shape[:2], 3) for part, each in zip(parts, features, strict=True)]


def pooled(encoder: Encoder, images: np.ndarray, batch: int = 64, scaled: bool = True) -> Tensor:
    """The pooled features [N, D] of images [N, C, S, S]. `scaled`: to length 1."""
    parts = [encoder.pooled(images[i : i + batch]) for i in range(0, len(images), batch)]
    return F.normalize(torch.cat(parts), dim=1) if scaled else torch.cat(parts)


def data_url(image: np.ndarray, max_side: int | None = None) -> str:
    """An image [C, H, W] or [H, W, 3] of any dtype as a data: URL; see `data_pipeline.formats.pixels.picture`. A large image becomes a JPEG, a small one a PNG. If a side
    is longer than `max_side` pixels, the image is reduced to that size."""
    shown = Image.fromarray(picture(image if image.shape[2] == 3 else image.transpose(1, 2, 0)))
    shown.thumbnail((max_side or shown.width, max_side or shown.height))
    kind, file = "png" if shown.width * shown.height < 500_000 else "jpeg", io.BytesIO()
    shown.save(file, kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def figure(alt: str, image: np.ndarray, caption: str, kind: str = "") -> str:
    """A picture with a caption, both of them text."""
    url = data_url(image)
    return (
        f'<figure{f" class={kind}" if kind else ""}><img alt="{escape(alt)}" src="{url}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


# ---------------------------------------------------------------- curves
def _ticks(low: float, high: float, max_intervals: int = 5) -> list[float]:
    """The round numbers in [low, high] at which an axis has marks. They are 1, 2, 2.5 or 5 × 10ⁿ apart."""
    unit = 10.0 ** math.floor(math.log10((high - low) / max_intervals))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f * max_intervals >= (high - low) * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float, percent: bool = False, unit: str = "") -> str:
    """A value as text with an SI prefix: 1250 becomes "1.25k", and with a unit "1.25 kB" or "1.25k samples/s"."""
    if percent:
        return f"{100 * value:.3g}%"
    size, prefix = next(((s, p) for s, p in SI_PREFIXES if s <= abs(value) < 1e18), (1.0, ""))
    if unit in PREFIXED_UNITS:
        return f"{value / size:.3g} {prefix}{unit}"
    end = f" {unit}" if unit else ""
    if prefix:
        return f"{value / size:.4g}{prefix}{end}"
    small = 0 < abs(value) < 1e-3
    return (f"{value:.1e}".replace(".0", "").replace("e-0", "e-") if small else f"{value:.3g}") + end


class _Line(NamedTuple):
    """A curve, reduced to k ≤ MAX_CHART_POINTS intervals of steps."""

    steps: np.ndarray  # [k], the mean step of each interval
    means: np.ndarray  # [k], the mean value of each interval
    smooth: np.ndarray  # [k], the moving mean of `means`
    extremes: list[tuple[float, float]]  # (step, value) of the lowest and the highest value of each interval


def _line(steps: list[float], values: list[float], smooth: bool) -> _Line:
    count = min(MAX_CHART_POINTS, len(steps))
    step_parts, value_parts = np.array_split(steps, count), np.array_split(values, count)
    x, y = (np.array([part.mean() for part in parts]) for parts in (step_parts, value_parts))
    extremes = [
        (step, value)
        for step, part in zip(x, value_parts, strict=True)
        for value in dict.fromkeys((part.min(), part.max()))
    ]
    window = np.ones(2 * (count // 30) + 1 if smooth else 1)
    moving_mean = np.convolve(y, window, "same") / np.convolve(np.ones(count), window, "same")
    return _Line(x, y, moving_mean, extremes)


def chart(
    title: str,
    series: Series,
    percent: bool = False,
    zero: bool = False,
    points: bool = False,
    smooth: bool = True,
    unit: str = "",
) -> str:
    """A chart as SVG, or "" if there are no values. `unit` is printed after the last value.

    `percent`: values are shares. `zero`: the vertical axis begins at 0. `points`: each value is a point. `smooth`: the
    thick line is the moving mean. The vertical axis contains the 1st to 99th percentile of the values, and the whole
    moving mean.
    """
    lines = {name: _line(*values, smooth and not points) for name, values in series.items() if values[0]}
    if not lines:
        return ""
    visible = np.concatenate(
        [np.append(np.percentile([y for _, y in line.extremes], [1, 99]), line.smooth) for line in lines.values()]
    )
    low, high = 0.0 if zero else visible.min(), visible.max()
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    if not zero and not low >= 0 > low - margin:  # no negative values on the axis if the curve has none
        low -= margin
    high += margin
    first = min(line.steps[0] for line in lines.values())
    last = max(first + 1, *(line.steps[-1] for line in lines.values()))

    def x(step: float) -> float:
        return 48 + 360 * (step - first) / (last - first)

    def y(value: float) -> float:
        return 198 - 188 * (min(max(value, low), high) - low) / (high - low)

    drawn, last_values = "", []
    for t in _ticks(low, high):
        drawn += f'<line x1="48" x2="408" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        drawn += f'<text x="42" y="{y(t) + 4:.1f}" text-anchor="end">{_number(t, percent)}</text>'
    drawn += "".join(
        f'<text x="{x(t):.1f}" y="216" text-anchor="middle">{_number(t)}</text>'
        for t in _ticks(first, last)
        if t == round(t)
    )
    for i, (name, line) in ((n, (name, lines[name])) for n, name in enumerate(series) if name in lines):
        for kind, path in (("raw", line.extremes), ("", zip(line.steps, line.smooth, strict=True))):
            drawn += f'<polyline class="s{i} {kind}" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in path)}"/>'
        for step, value in zip(line.steps, line.means, strict=True) if points else ():
            label = f"step {step:g}: {_number(value, percent)}"
            drawn += (
                f'<circle class="s{i}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="4"><title>{label}</title></circle>'
            )
        last_values.append(f'<b class="s{i}">{escape(name)}</b> {_number(line.smooth[-1], percent, unit)}')
    svg = f'<svg viewBox="0 0 420 222" role="img" aria-label="{escape(title)} by step">{drawn}</svg>'
    return f'<div class="card"><h3>{escape(title)}<span>{" · ".join(last_values)}</span></h3>{svg}</div>'


def scatter(
    title: str, unit: str, names: Sequence[str], xs: Sequence[float], ys: Sequence[float], percent: bool = False
) -> str:
    """A card with one point for each name, as SVG. The horizontal axis is logarithmic, and in `unit`. `percent`: the
    vertical values are shares. Points that are not finite, or not above 0 on the horizontal axis, are left out."""
    shown = [
        (i, name, x, y)
        for i, (name, x, y) in enumerate(zip(names, xs, ys, strict=True))
        if x > 0 and math.isfinite(x) and math.isfinite(y)
    ]
    if not shown:
        return ""
    logs, values = [math.log10(x) for _, _, x, _ in shown], [y for *_, y in shown]
    left, right, low, high = min(logs), max(logs), min(values), max(values)
    margin_x, margin_y = 0.15 * (right - left) or 0.3, 0.15 * (high - low) or abs(high) * 0.1 or 1.0
    left, right, low, high = left - margin_x, right + margin_x, low - margin_y, high + margin_y
    drawn = ""
    for t in _ticks(low, high):
        y = 198 - 188 * (t - low) / (high - low)
        drawn += f'<line x1="48" x2="408" y1="{y:.1f}" y2="{y:.1f}"/>'
        drawn += f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{_number(t, percent)}</text>'
    round_numbers = sorted(factor * 10.0**n for n in range(-6, 13) for factor in (1, 2, 5))
    marks = [t for t in round_numbers if left <= math.log10(t) <= right]
    for t in marks if len(marks) > 1 else sorted({min(x for _, _, x, _ in shown), max(x for _, _, x, _ in shown)}):
        x = 48 + 360 * (math.log10(t) - left) / (right - left)
        drawn += f'<text x="{x:.1f}" y="216" text-anchor="middle">{_number(t)}</text>'
    legend = []
    for i, name, given, value in shown:
        x = 48 + 360 * (math.log10(given) - left) / (right - left)
        y = 198 - 188 * (value - low) / (high - low)
        tip = f"{name}: {_number(value, percent)}, {_number(given)} {unit}"
        drawn += f'<circle class="s{i % 8}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(tip)}</title></circle>'
        legend.append(f'<b class="s{i % 8}">{escape(name)}</b>')
    svg = f'<svg viewBox="0 0 420 222" role="img" aria-label="{escape(title)}">{drawn}</svg>'
    return (
        f'<div class="card"><h3>{escape(title)}</h3>{svg}<p class="soft">{escape(unit)} (logarithmic) ·'
        f" {' · '.join(legend)}</p></div>"
    )
