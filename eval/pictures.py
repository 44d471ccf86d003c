"""Pictures for the report: images, patches and curves.

Patch features are shown as colours: the three directions in which they vary most (PCA) become red, green and blue, as
DINOv2 shows them (arXiv 2304.07193). Shapes: N images, M mosaics, S pixels per image side, h × w patches, D features.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.errors import Damaged, DataError
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center
from eval.features import Encoder

Series = dict[str, tuple[list[float], list[float]]]  # {name: (steps, values)}
SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PREFIXED = ("FLOP/s", "B")  # units that take such a prefix
Labels = Sequence[str | None]  # None for an image without a label


def load_some(samples: Samples, limit: int, size: int) -> tuple[np.ndarray, Labels]:
    """(center crops uint8 [N, 3, S, S], labels) of up to `limit` images that are evenly spaced, without damaged
    ones."""
    images, labels = [], []
    for number in np.linspace(0, len(samples) - 1, min(limit, len(samples))).round().astype(int):
        try:
            image = center(samples.image(number), size)
            label = samples.label(number)
        except Damaged:
            continue
        except DataError:
            label = None
        images.append(image)
        labels.append(label)
    if not images:
        raise DataError(f"{samples.names}: none of the images that were tried can be read")
    return np.stack(images), labels


def spread(labels: Labels, groups: int, each: int) -> list[list[int]]:
    """The numbers of the images in `groups` groups of `each`. A group has images of one class, evenly spaced; as long
    as there are further classes, each group has another one.

    Classes with fewer than `each` images are ignored. If there is no other class, or if there are no labels, all images
    count as one class.
    """
    classes: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        classes.setdefault(label or "", []).append(number)
    found = [classes[name] for name in sorted(classes) if len(classes[name]) >= each] or [list(range(len(labels)))]
    if len(found) > groups:
        found = [found[i * len(found) // groups] for i in range(groups)]
    out = []
    parts = each * -(-groups // len(found))  # each class is divided into so many parts, whose middle images are taken
    for group in range(groups):
        turn, members = group // len(found), found[group % len(found)]
        out.append([members[(2 * (turn + j * (parts // each)) + 1) * len(members) // (2 * parts)] for j in range(each)])
    return out


def mosaic(images: np.ndarray, edge: int = 4) -> np.ndarray:
    """[edge·edge, 3, S, S] → [3, edge·S, edge·S], row by row."""
    rows = images.reshape(edge, edge, *images.shape[1:]).transpose(2, 0, 3, 1, 4)
    return rows.reshape(images.shape[1], edge * images.shape[2], edge * images.shape[3])


def patch_features(encoder: Encoder, image: np.ndarray) -> np.ndarray:
    """Features [h, w, D] of the patches of an image uint8 [3, H, W], at its full resolution."""
    features = encoder(image[None])
    return features.tokens[0].unflatten(0, features.grid).float().cpu().numpy()


def pca_colors(features: np.ndarray) -> np.ndarray:
    """Patch features [M, h, w, D] as colours, uint8 [M, h, w, 3]: their first three principal components, computed for
    all patches together.

    The arbitrary sign of a component is chosen so that its largest loading is positive. Its 2nd and 98th percentiles
    become 0 and 255.
    """
    flat = np.nan_to_num(features.reshape(-1, features.shape[-1]).astype(np.float64))
    flat -= flat.mean(0)
    vectors = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :3]  # eigenvalues ascend
    vectors = vectors * np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0))
    values = flat @ vectors
    low, high = np.percentile(values, [2, 98], axis=0)
    colors = ((values - low) / np.maximum(high - low, 1e-12) * 255).clip(0, 255).round().astype(np.uint8)
    return np.pad(colors, ((0, 0), (0, 3 - colors.shape[1]))).reshape(*features.shape[:-1], 3)


def similarity(encoder: Encoder, queries: np.ndarray, gallery: np.ndarray, batch: int = 64) -> Tensor:
    """Cosine similarity [Q, N] of the pooled features of images [Q, 3, S, S] and [N, 3, S, S]."""
    pooled = [
        torch.cat([encoder.pooled(images[i : i + batch]) for i in range(0, len(images), batch)])
        for images in (queries, gallery)
    ]
    return F.normalize(pooled[0], dim=1) @ F.normalize(pooled[1], dim=1).T


def data_url(image: np.ndarray, max_side: int | None = None) -> str:
    """An image uint8 [3, H, W] or [H, W, 3] as a data: URL, a PNG or, if it is large, a JPEG. It is reduced if a side
    is longer than `max_side` pixels."""
    picture = Image.fromarray(image if image.shape[2] == 3 else image.transpose(1, 2, 0))
    picture.thumbnail((max_side or picture.width, max_side or picture.height))
    kind, file = "png" if picture.width * picture.height < 500_000 else "jpeg", io.BytesIO()
    picture.save(file, kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------- curves
def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 × 10ⁿ apart) within [low, high]."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f * most >= (high - low) * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float, percent: bool = False, unit: str = "") -> str:
    """A value as text with an SI prefix: 1250 becomes "1.25k", "1.25 kB" or "1.25k samples/s", depending on the
    unit."""
    if percent:
        return f"{100 * value:.3g}%"
    size, prefix = next(((s, p) for s, p in SI if s <= abs(value) < 1e18), (1.0, ""))
    if unit in PREFIXED:
        return f"{value / size:.3g} {prefix}{unit}"
    end = f" {unit}" if unit else ""
    if prefix:
        return f"{value / size:.4g}{prefix}{end}"
    small = 0 < abs(value) < 1e-3
    return (f"{value:.1e}".replace(".0", "").replace("e-0", "e-") if small else f"{value:.3g}") + end


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

    The vertical axis shows the 1st to 99th percentile of the values, and the whole moving mean.
    """
    # For each name, the values are averaged over at most 400 intervals of steps: (steps, means, moving means), and the
    # lowest and the highest value of each interval as [(step, value), …], so that no spike is lost.
    lines = {}
    for name, (steps, values) in series.items():
        if steps:
            parts = [np.array_split(a, min(400, len(a))) for a in (steps, values)]
            x, y = (np.array([part.mean() for part in side]) for side in parts)
            raw = [(a, b) for a, part in zip(x, parts[1], strict=True) for b in dict.fromkeys((part.min(), part.max()))]
            window = np.ones(2 * (len(y) // 30) + 1 if smooth and not points else 1)
            lines[name] = (x, y, np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same"), raw)
    if not lines:
        return ""
    shown = np.concatenate(
        [np.append(np.percentile([b for _, b in raw], [1, 99]), mean) for _, _, mean, raw in lines.values()]
    )
    low, high = 0.0 if zero else shown.min(), shown.max()
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low if zero or low >= 0 > low - room else low - room, high + room
    first, last = min(x[0] for x, *_ in lines.values()), max(x[-1] for x, *_ in lines.values())
    last = max(last, first + 1)
    across, down = (
        lambda x: 48 + 360 * (x - first) / (last - first),
        lambda y: 198 - 188 * (min(max(y, low), high) - low) / (high - low),
    )
    drawn, last_values = "", []
    for t in _ticks(low, high):
        drawn += f'<line x1="48" x2="408" y1="{down(t):.1f}" y2="{down(t):.1f}"/>'
        drawn += f'<text x="42" y="{down(t) + 4:.1f}" text-anchor="end">{_number(t, percent)}</text>'
    drawn += "".join(
        f'<text x="{across(t):.1f}" y="216" text-anchor="middle">{_number(t)}</text>'
        for t in _ticks(first, last)
        if t == round(t)
    )
    for i, (name, (x, y, mean, raw)) in enumerate(lines.items()):
        for kind, line in (("raw", raw), ("", zip(x, mean, strict=True))):
            path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in line)
            drawn += f'<polyline class="s{i} {kind}" points="{path}"/>'
        for a, b in zip(x, y, strict=True) if points else ():
            label = f"step {a:g}: {_number(b, percent)}"
            drawn += (
                f'<circle class="s{i}" cx="{across(a):.1f}" cy="{down(b):.1f}" r="4"><title>{label}</title></circle>'
            )
        last_values.append(f'<b class="s{i}">{name}</b> {_number(mean[-1], percent, unit)}')
    svg = f'<svg viewBox="0 0 420 222" role="img" aria-label="{escape(title)} by step">{drawn}</svg>'
    return f'<div class="card"><h3>{escape(title)}<span>{" · ".join(last_values)}</span></h3>{svg}</div>'
