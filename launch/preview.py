"""Draw the input of a recipe's model: all views of some samples from the first batches, with masked patches
darkened, and their captions as the model reads them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from common.errors import DataError
from data_pipeline.build.contact_sheet import LINE_HEIGHT, Font, save_sheet
from data_pipeline.formats.pixels import PIXEL_DTYPES, displayed, picture
from data_pipeline.views import device_color
from pretrain.build import build_objective, build_stream, open_samples, stored_pixels
from pretrain.recipes.parallel_checks import micro_batch_size
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.prepare import check_data

TILE, GAP = 128, 4  # pixels
TEXT_WIDTH, TEXT_COLUMNS = 260, 40  # pixels and characters of a line of a caption, to the right of the views
MASKED_BRIGHTNESS = 0.25  # brightness of masked patches, relative to other patches


def preview(recipe: Recipe, target: str | Path, rows: int = 8) -> Path:
    """Write an image file with one row of views for each of `rows` samples from the first batches of the training.

    Returns its path. Raises DataError if it cannot be written, or if there are no images to draw.
    """
    target = Path(target)
    check_data(recipe)
    samples = open_samples(recipe)
    recipe.data.pixel_dtype = stored_pixels(recipe, samples) or recipe.data.pixel_dtype
    with torch.device("meta"):  # views depend on shapes only, so the weights need no memory
        objective = build_objective(recipe)
    backbone = objective.encoder()
    side = backbone.image_size // (backbone.patch_size or backbone.image_size)  # number of patches along one side
    tubelet = backbone.about().get("tubelet", 0)
    recipe = small(recipe, sum(map(len, samples)))
    size = recipe.data.batch_size
    stream = build_stream(recipe, objective, samples)
    vocabulary = next((part.vocabulary for part in objective.parts.values() if part.vocabulary), None)
    tokenizer = vocabulary.tokenizer() if vocabulary else None
    lines: list[list[np.ndarray]] = []  # the views of each sample
    captions: list[str] = []
    while len(lines) < rows:
        batch = next(stream)
        not_per_sample = stream.batches.collated(batch)  # tensors that do not have one row per sample
        arrays = {key: value.numpy() for key, value in _colored(batch).items() if key not in not_per_sample}
        lines += [
            _views({k: v[n] for k, v in arrays.items()}, side, tubelet) for n in range(min(size, rows - len(lines)))
        ]
        if tokenizer is not None and {"tokens", "last"} <= arrays.keys():
            captions += [_text(*row, tokenizer) for row in zip(arrays["tokens"], arrays["last"], strict=True)]
    stream.close()
    if not lines[0]:
        raise DataError(f"{recipe.objective.name} makes no images of its samples, so there is nothing to draw")
    width = max(len(line) for line in lines)
    right = width * (TILE + GAP) + GAP
    page = Image.new("RGB", (right + (TEXT_WIDTH if captions else 0), len(lines) * (TILE + GAP) + GAP), "white")
    font, draw = Font(), ImageDraw.Draw(page)
    for row, line in enumerate(lines):
        if captions:
            text = textwrap.wrap(captions[row], TEXT_COLUMNS, max_lines=TILE // LINE_HEIGHT, placeholder="…")
            font.draw(draw, (right, GAP + row * (TILE + GAP)), text)
        for column, view in enumerate(line):
            tile = Image.fromarray(view).resize((TILE, TILE), Image.Resampling.NEAREST if view.shape[0] < TILE else 1)
            page.paste(tile, (GAP + column * (TILE + GAP), GAP + row * (TILE + GAP)))
    save_sheet(page, target)
    return target


def _text(tokens: np.ndarray, last: np.ndarray, tokenizer: Any) -> str:
    """The caption of a row of tokens [T] up to its last token, EOS, as text."""
    return tokenizer.decode(tokens[: int(last) + 1].tolist(), skip_special_tokens=False)


def small(recipe: Recipe, samples: int) -> Recipe:
    """A copy of the recipe that reads without worker processes, with batches of at most `samples`.

    `parallel.micro_batch` is removed if it does not divide the batch.
    """
    data, parallel = recipe.data, recipe.parallel
    if data.budget is not None:
        return recipe.replace(data=data.replace(workers=0), parallel=parallel.replace(micro_batch=None))
    micro = micro_batch_size(recipe) or 1
    if data.batch_size > samples or data.batch_size % micro:
        parallel = parallel.replace(micro_batch=None)
    phases = [phase for phase in data.phases if not phase.batch or phase.batch <= samples]
    return recipe.replace(
        data=data.replace(workers=0, batch=min(data.batch_size, samples), phases=phases), parallel=parallel
    )


def _colored(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch after the colour augmentations that training applies on the device."""
    out = {}
    for key, value in batch.items():
        if f"{key}.color" in batch:  # mean 0 and deviation 1: no normalisation
            constants = device_color.constants([0.0], [1.0], torch.device("cpu"), value.dtype)
            value = device_color.apply(value, batch[f"{key}.color"], constants)
        if not key.endswith(".color"):
            out[key] = value
    return out


def _views(sample: dict[str, Any], side: int, tubelet: int = 0) -> list[np.ndarray]:
    """All views [H, W, 3] of one sample of a batch, with masked patches darkened; a clip is a strip of its frames.
    `side`: number of patches along one side. `tubelet`: number of frames of a token of a clip.

    The mask is applied to the first entry that has as many views as the mask.
    """
    out, masked = [], False
    for value in sample.values():
        if value.dtype.name not in PIXEL_DTYPES or value.ndim < 3:
            continue
        views = displayed(value).reshape(-1, *value.shape[-3:])
        mask = None if masked else _mask(sample, len(views), side, tubelet)
        masked = masked or mask is not None
        for n, view in enumerate(views):
            image = picture(view.transpose(1, 2, 0))
            out.append(image if mask is None else _darken(image, mask[n]))
    return out


def _mask(sample: dict[str, Any], count: int, side: int, tubelet: int) -> np.ndarray | None:
    """bool [views, patches], true for patches that the model does not see; None if there is no mask for `count` views.

    The sample of an objective has either "mask", or "keep", the indices of the patches that the model sees.
    """
    if "mask" in sample and sample["mask"].size == count * side**2:
        return sample["mask"].reshape(count, -1)
    if "keep" in sample and tubelet:  # of each clip, int64 [clips, K]
        keep = sample["keep"]
        masked = np.ones((len(keep), count // len(keep) // tubelet * side**2), bool)
        np.put_along_axis(masked, keep, False, axis=1)
        return masked.reshape(len(keep), -1, side**2).repeat(tubelet, axis=1).reshape(count, -1)
    if "keep" in sample and count == 1:
        return ~np.isin(np.arange(side**2), sample["keep"])[None]
    return None


def _darken(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] with some patches darkened. `patches`: bool [number of patches]."""
    if not patches.any():
        return image
    side = round(len(patches) ** 0.5)
    mask = np.array(Image.fromarray(patches.reshape(side, side)).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    return np.where(mask[..., None], image * MASKED_BRIGHTNESS, image).astype(np.uint8)
