"""A map of features in two dimensions, on which samples with similar features are close together: t-SNE (van der Maaten
and Hinton, 2008), computed exactly for the few hundred samples that a picture can show.

Shapes: N samples, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.formats.pixels import picture
from data_pipeline.views.augmentations import resize

PERPLEXITY = 20.0  # effective number of neighbours of a sample
STEPS, EARLY_STEPS = 350, 100  # in the early steps attraction is multiplied by EXAGGERATION
EXAGGERATION = 12.0
MAX_LEGEND = 24  # classes in the legend
MAP_SIDE = 900  # pixels of the map of images
SEARCH_STEPS = 40  # bisections of the width of each sample's neighbourhood


def positions(features: Tensor) -> np.ndarray:
    """The places of samples with features [N, D] on the map, float64 [N, 2], from 0 to 1. They are deterministic.

    Distances are those of features of length 1, because the other pictures of a report compare features by their
    cosine, too. Features that are not finite count as 0."""
    x = F.normalize(torch.nan_to_num(features.double()), dim=1)
    if len(x) < 4:
        return np.column_stack([np.linspace(0, 1, len(x)), np.full(len(x), 0.5)])
    neighbours = _neighbours(torch.cdist(x, x).square()).float()
    y = _start(x).float()
    change, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(x) / EXAGGERATION / 4, 50.0)
    for step in range(STEPS):
        early = step < EARLY_STEPS
        near = 1 / (1 + torch.cdist(y, y).square())  # [N, N]
        near.fill_diagonal_(0)
        force = ((EXAGGERATION if early else 1.0) * neighbours - near / near.sum()) * near
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gains = torch.where(gradient.sign() == change.sign(), gains * 0.8, gains + 0.2).clamp_min(0.01)
        change = (0.5 if early else 0.8) * change - rate * gains * gradient
        y = y + change
    low = y.amin(0)
    return ((y - low) / (y.amax(0) - low).clamp_min(1e-12)).double().numpy()


def _neighbours(squares: Tensor) -> Tensor:
    """The joint probabilities P [N, N] that two samples are neighbours, from squared distances [N, N]."""
    count = len(squares)
    others = ~torch.eye(count, dtype=torch.bool)
    distances = squares[others].view(count, count - 1)
    distances = distances - distances.amin(1, keepdim=True)
    goal = np.log(min(PERPLEXITY, (count - 1) / 3))
    low, high = torch.full((count, 1), -20.0).double(), torch.full((count, 1), 40.0).double()  # log of the precision
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        share = torch.softmax(-distances * middle.exp(), 1)
        entropy = -torch.xlogy(share, share).sum(1, keepdim=True)
        low, high = torch.where(entropy > goal, middle, low), torch.where(entropy > goal, high, middle)
    out = torch.zeros_like(squares)
    out[others] = torch.softmax(-distances * ((low + high) / 2).exp(), 1).flatten()
    return (out + out.T) / (2 * count)


def _start(x: Tensor) -> Tensor:
    """The first two principal components, with a small variance; signs are chosen as in `pictures.pca_colors`."""
    centred = x - x.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :2]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    y = F.pad(centred @ vectors, (0, 2 - vectors.shape[1]))
    return 1e-4 * y / y[:, 0].std().clamp_min(1e-12)


# ---------------------------------------------------------------- pictures
def points(title: str, places: np.ndarray, labels: Sequence[str | None]) -> str:
    """A card with the map as points [N, 2], whose colours are the classes, and a legend of the classes."""
    names = sorted({label for label in labels if label is not None})
    color = {
        name: f"hsl({360 * n / len(names):.0f} {75 - 25 * (n % 2)}% {46 + 14 * (n % 3 - 1)}%)"
        for n, name in enumerate(names)
    }
    drawn = ""
    for (x, y), label in zip(places, labels, strict=True):
        fill = f' style="color:{color[label]}"' if label is not None else ""
        tip = f"<title>{escape(label)}</title>" if label else ""
        drawn += f'<circle cx="{8 + 404 * x:.1f}" cy="{8 + 304 * y:.1f}" r="4"{fill}>{tip}</circle>'
    shown = names[:MAX_LEGEND]
    legend = "".join(f'<span><i style="background:{color[name]}"></i>{escape(name)}</span>' for name in shown)
    more = f"<span>and {len(names) - len(shown)} more</span>" if len(names) > len(shown) else ""
    svg = f'<svg viewBox="0 0 420 320" role="img" aria-label="map of the features, {escape(title)}">{drawn}</svg>'
    return f'<div class="card"><h3>{escape(title)}</h3>{svg}<p class="legend">{legend}{more}</p></div>'


def thumbnails(places: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The map with images [N, C, S, S] in the place of points, uint8 [H, W, 3]. Each is in the free cell of a grid that
    is nearest to its place."""
    columns = math.ceil(math.sqrt(2 * len(images)))
    cell = MAP_SIDE // columns
    canvas = np.full((columns * cell, columns * cell, 3), 128, np.uint8)
    grid = np.stack(np.meshgrid(range(columns), range(columns), indexing="ij"), -1).reshape(-1, 2)  # (row, column)
    free = np.ones(len(grid), bool)
    for (x, y), image in zip(places * (columns - 1), images, strict=True):
        distances = np.where(free, np.square(grid - (y, x)).sum(1), np.inf)
        found = int(distances.argmin())
        free[found] = False
        top, left = grid[found] * cell
        canvas[top : top + cell, left : left + cell] = resize(picture(image.transpose(1, 2, 0)), (cell, cell))
    return canvas
