"""A picture of what a recipe's model will see: for some samples of the first batches, every view that is made of it, with the masks over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline import device_color
from data_pipeline.storage import DataError
from pretrain.recipe import Recipe
from pretrain.run_folder import check_data
from pretrain.train import build_objective, build_stream, open_samples

TILE, GAP = 128, 4  # pixels
HIDDEN = 0.25  # of a masked patch's brightness is left


def preview(recipe: Recipe, target: str | Path, rows: int = 8) -> Path:
    """Write a row of views for each of `rows` samples; the views are those of the training's first batches. Raises DataError."""
    target = Path(target)
    check_data(recipe)
    with torch.device("meta"):  # the objective's shapes decide on views; no weights are needed
        objective = build_objective(recipe)
    body, size = objective.encoder(), recipe.data.batch
    side = body.image_size // (body.patch_size or body.image_size)  # patches
    stream = build_stream(recipe.replace(data=recipe.data.replace(workers=0)), objective, open_samples(recipe))
    lines: list[list[np.ndarray]] = []
    while len(lines) < rows:
        batch = {key: value.numpy() for key, value in _colored(next(stream)).items()}
        lines += [_views({k: v[n] for k, v in batch.items()}, side) for n in range(min(size, rows - len(lines)))]
    stream.close()
    if not lines[0]:
        raise DataError(f"{recipe.objective.name} makes no images of its samples, so there is nothing to draw")
    width = max(len(line) for line in lines)
    page = Image.new("RGB", (width * (TILE + GAP) + GAP, len(lines) * (TILE + GAP) + GAP), "white")
    for row, line in enumerate(lines):
        for column, view in enumerate(line):
            tile = Image.fromarray(view).resize((TILE, TILE), Image.Resampling.NEAREST if view.shape[0] < TILE else 1)
            page.paste(tile, (GAP + column * (TILE + GAP), GAP + row * (TILE + GAP)))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        page.save(target)
    except (OSError, ValueError) as error:
        raise DataError(f"{target}: cannot be written ({error}); write a name that ends in .png") from None
    return target


def _colored(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch after what the device would do to its colours."""
    return {
        key: device_color.apply(value, batch[f"{key}.color"]) if f"{key}.color" in batch else value
        for key, value in batch.items()
        if not key.endswith(".color")
    }


def _views(sample: dict[str, Any], side: int) -> list[np.ndarray]:
    """All images [H, W, 3] of one sample's part of a batch, the masked patches dark; a mask belongs to the first entry with as many views."""
    out, shaded = [], False
    for value in sample.values():
        if value.dtype != np.uint8 or value.ndim < 3:
            continue
        views = value.reshape(-1, *value.shape[-3:])
        hidden = None if shaded else _hidden(sample, len(views), side)
        shaded = shaded or hidden is not None
        for n, view in enumerate(views):
            image = view[:3] if len(view) >= 3 else view[:1].repeat(3, 0)
            out.append(
                _shade(np.ascontiguousarray(image.transpose(1, 2, 0)), hidden[n] if hidden is not None else None)
            )
    return out


def _hidden(sample: dict[str, Any], count: int, side: int) -> np.ndarray | None:
    """bool [views, patches]: "mask" says which patches a model does not see, "keep" which it does."""
    if "mask" in sample and sample["mask"].size == count * side**2:
        return sample["mask"].reshape(count, -1)
    if "keep" in sample and count == 1:
        return ~np.isin(np.arange(side**2), sample["keep"])[None]
    return None


def _shade(image: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    if hidden is None or not hidden.any():
        return image
    side = round(len(hidden) ** 0.5)
    mask = np.array(Image.fromarray(hidden.reshape(side, side)).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    return np.where(mask[..., None], image * HIDDEN, image).astype(np.uint8)
