"""Compare the exports of a run as Gram teachers, by statistics of their patch similarities. No labels are needed
(DINOv3, arXiv 2508.10104 §4).

For some images of the run's data, the similarity map of an image is computed: the cosine similarities of its N patches,
N × N. It is computed twice: from the image at the model's size, and from the image at twice that size, with the
features resized to the same grid. Long training makes these maps noisy:

    agreement   correlation of the two maps without their diagonals; noise depends on the resolution and lowers it
    contrast    standard deviation of the similarities; 0 if the features of all patches are equal
    coherence   mean similarity of adjacent patches minus that of all pairs, divided by the contrast
    score       agreement × contrast: the part of the contrast that both resolutions have in common

In a short run contrast rises throughout, so that the last export has the best score. In a run whose dense features
degrade, agreement falls faster than contrast rises. Agreement alone falls from the start: in `benchmarks/gram.py` it
falls together with the area under the ROC curve of similarity maps (0.865 to 0.804 in 600 steps), while the accuracy of
k-NN on patches rises and then stays constant. If labels exist, a score of dense features is a better criterion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from data_pipeline.formats.pixels import rounded
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center
from eval.features import Encoder, open_encoder
from pretrain.ops.gram import resize_map
from pretrain.run_folder.export_folders import exports

COLUMNS = ("agreement", "contrast", "coherence", "score")


def compare(run: Path, shards: list[str], images: int = 64) -> list[dict[str, Any]]:
    """A row for each export except the untrained one: its step, and the means of the four statistics over images.

    Raises UserError if there is no such export, or if the model does not read images.
    """
    found = {step: folder for step, folder in exports(run).items() if step > 0}
    if not found:
        raise UserError(
            f"{run}: has no export of a trained step; export.every in its recipe sets how often a run exports"
        )
    rows, pictures = [], None
    for step, folder in found.items():
        encoder, _ = open_encoder(str(folder))
        if encoder.unit != "images":
            raise UserError(f"{run}: trains a model for text, which has no patches; name a run on images")
        if pictures is None:
            pictures = load(shards, encoder, images)
        values = [statistics(encoder, image) for image in pictures]
        rows.append({"step": step} | {key: float(np.mean([v[key] for v in values])) for key in COLUMNS[:3]})
        rows[-1]["score"] = rows[-1]["agreement"] * rows[-1]["contrast"]
    return rows


def load(shards: list[str], encoder: Encoder, count: int) -> np.ndarray:
    """Center crops [count, C, 2S, 2S] of images that are spread evenly over the shards. S: the encoder's size."""
    samples = Samples(shards)
    numbers = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)
    return np.stack([center(encoder.image(samples, int(n)), 2 * encoder.image_size) for n in numbers])


def statistics(encoder: Encoder, image: np.ndarray) -> dict[str, float]:
    """Agreement, coherence and contrast of one image [C, 2S, 2S]."""
    large = torch.from_numpy(image)[None].float()
    half = F.interpolate(large, scale_factor=0.5, mode="bicubic", antialias=True).numpy()
    small = rounded(half, image.dtype)
    features, features_large = encoder(small), encoder(image[None])
    map_small = similarities(features.tokens)  # [N, N]
    map_large = similarities(resize_map(features_large.tokens, features_large.grid, features.grid))  # [N, N]
    off_diagonal = ~torch.eye(len(map_small), dtype=torch.bool, device=map_small.device)
    x, y = map_small[off_diagonal], map_large[off_diagonal]  # [N·(N − 1)]
    # [h, w]: the number of each patch
    patch = torch.arange(len(map_small), device=map_small.device).view(features.grid)  # type: ignore[arg-type]
    horizontal, vertical = map_small[patch[:, 1:], patch[:, :-1]], map_small[patch[1:], patch[:-1]]
    adjacent = torch.cat([horizontal.flatten(), vertical.flatten()])
    deviation = x.std().clamp(min=1e-6)
    correlation = ((x - x.mean()) * (y - y.mean())).mean() / (deviation * y.std().clamp(min=1e-6))
    coherence = (adjacent.mean() - x.mean()) / deviation
    return {"agreement": float(correlation), "coherence": float(coherence), "contrast": float(x.std())}


def similarities(tokens: Tensor) -> Tensor:
    """Cosine similarities [N, N] of the patches of one image, [1, N, D]."""
    x = F.normalize(tokens[0].float(), dim=-1)
    return x @ x.T


def table(rows: list[dict[str, Any]], run: Path) -> str:
    """The rows as a text table, and the override that chooses the best export as the Gram teacher."""
    lines = [f"{'step':>10}" + "".join(f"{c:>12}" for c in COLUMNS)]
    lines += [f"{r['step']:>10}" + "".join(f"{r[c]:>12.4f}" for c in COLUMNS) for r in rows]
    best = max(rows, key=lambda r: r["score"])
    return "\n".join(
        [
            *lines,
            f"step {best['step']} has the clearest similarities: objective.gram_teacher={exports(run)[best['step']]}",
        ]
    )
