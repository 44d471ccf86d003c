"""Draw the input of a recipe's audio model: the spectrograms of some cuts of the first batches, with what is masked
darkened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.build.audio_stats import picture
from data_pipeline.build.contact_sheet import save_sheet
from launch.preview import GAP, MASKED_BRIGHTNESS, small
from pretrain.build import build_objective, build_stream, open_samples, placed
from pretrain.ops.cross_entropy import IGNORED
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import check_data

MAX_WIDTH = 1200  # pixels


def preview(recipe: Recipe, target: str | Path, rows: int = 8) -> Path:
    """Write an image file with the spectrogram of one cut of each of `rows` samples from the first batches of the
    training. Returns its path. Raises UserError."""
    check_data(recipe)
    with torch.device("meta"):  # views depend on options and shapes only, so the weights need no memory
        objective = build_objective(recipe)
    samples = open_samples(recipe)
    recipe = small(recipe, sum(map(len, samples)))
    stream, pictures = build_stream(recipe, objective, samples), list[np.ndarray]()
    patch = objective.encoder().about().get("patch_size", 0)
    while len(pictures) < rows:
        batch = placed(objective, next(stream), torch.device("cpu"))
        for n in range(min(len(batch["id"]), rows - len(pictures))):
            pictures += spectrograms({key: value[n].numpy() for key, value in batch.items() if value.ndim}, patch)
    stream.close()
    scale = max(1, MAX_WIDTH // max(each.shape[1] for each in pictures)) if pictures else 1
    sizes = [(min(MAX_WIDTH, scale * each.shape[1]), scale * each.shape[0]) for each in pictures]
    page = Image.new("RGB", (max(w for w, _ in sizes) + 2 * GAP, sum(h + GAP for _, h in sizes) + GAP), "white")
    top = GAP
    for each, size in zip(pictures, sizes, strict=True):
        page.paste(Image.fromarray(each).resize(size, Image.Resampling.NEAREST), (GAP, top))
        top += size[1] + GAP
    save_sheet(page, Path(target))
    return Path(target)


def spectrograms(sample: dict[str, Any], patch: int) -> list[np.ndarray]:
    """The pictures uint8 [M, T, 3] of one sample of a placed batch: of its log-mel features [T, M], or of its images
    [1, M, T]. Masked are the groups of frames that have a target, and the patches of `patch` pixels that are not kept."""
    out = []
    for name, value in sample.items():
        if name not in ("audio", "image"):
            continue
        features = value[0].T if value.ndim == 3 else value  # [T, M]
        image = picture(features)
        masked = np.zeros(image.shape[:2], bool)
        if "targets" in sample:
            groups = sample["targets"] != IGNORED
            columns = np.repeat(groups, -(-len(features) // len(groups)))[: len(features)]
            masked[:, : len(columns)] = columns
        if "keep" in sample and patch:
            grid = (image.shape[0] // patch, image.shape[1] // patch)
            unseen = ~np.isin(np.arange(grid[0] * grid[1]), sample["keep"]).reshape(grid)
            masked = np.kron(unseen, np.ones((patch, patch), bool))[::-1]  # row 0 of the grid holds the low bands
        out.append(np.where(masked[..., None], image * MASKED_BRIGHTNESS, image).astype(np.uint8))
    return out
