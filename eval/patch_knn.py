"""Semantic segmentation by k-nearest-neighbour patches, without any training: the quick score of dense features.

As in CAPI (arXiv 2502.08769): images and masks are resized to one square, the label of a patch is the most frequent
class of its pixels, and the nearest patches of the gallery, by cosine similarity, vote for the class of a patch. k is
chosen from 1, 3, 10 and 30 on a held-out tenth of the gallery's images. mIoU is computed on the pixels of the square.

At most `patches` patches of the gallery, the same number from each image, are held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.config import Section, option
from common.errors import UserError
from data_pipeline.formats.pixel_maps import MASKS
from data_pipeline.views.dense_views import resized
from eval.dense_data import IGNORED, Pairs, whole_patches
from eval.features import Encoder
from eval.knn import nearest
from eval.probe_training import tokens_of
from eval.segmentation import class_map, confusion_of, count_classes, scores, scores_of

NEEDS = "masks"
UNIT = "images"
VERSION = 1


@dataclass
class Config(Section):
    member: str = ""  # ending of the masks; empty: mask.png, seg.png, or png beside a JPEG
    classes: int | None = option(None, low=2)  # number of classes; null: the largest number in the gallery, plus 1
    ignore: list[int] = option(lambda: [255], low=0)  # numbers in masks of pixels that are not scored
    zero_is_void: bool = False  # number 0 is not scored either, and class n has the number n + 1, as in ADE20K
    size: int | None = option(None, low=1)  # side of the square in pixels; null: that of the model; CAPI: 224
    k: list[int] = option(lambda: [1, 3, 10, 30], low=1)  # numbers of neighbours, from which one is chosen
    patches: int = option(1 << 18, low=1)  # of the gallery, in memory
    hold_out: float = option(0.1, above=0, below=1)  # share of the gallery's images on which k is chosen
    batch: int = option(16, low=1)  # images that are encoded together
    seed: int = 0  # of the choice of patches and of held-out images


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises DataError if no sample holds both an image and a map."""
    Pairs(None, shards, cfg.member, MASKS, "patch_knn.member")


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"miou", "pixel_accuracy", "k": the chosen number of neighbours, "classes", "size"}, and the numbers of images."""
    if not cfg.k:
        raise UserError("patch_knn.k = []: write one number of neighbours or more")
    train_set, test_set = (Pairs(encoder, specs, cfg.member, MASKS, "patch_knn.member") for specs in (gallery, query))
    size = whole_patches(cfg.size or encoder.image_size, encoder.patch_size, "patch_knn.size")
    classes = cfg.classes or count_classes(train_set, cfg)
    order = np.random.default_rng(cfg.seed).permutation(train_set.numbers)
    held_out = max(1, int(cfg.hold_out * len(order))) if len(cfg.k) > 1 and len(order) > 1 else 0
    k = cfg.k[0]
    if held_out:
        features, labels = _gallery(train_set, np.sort(order[held_out:]), classes, size, cfg)
        chosen = _confusions(train_set, np.sort(order[:held_out]), features, labels, cfg.k, classes, size, cfg)
        k = max(cfg.k, key=lambda each: scores(chosen[each])["miou"])
    features, labels = _gallery(train_set, train_set.numbers, classes, size, cfg)
    confusion = _confusions(test_set, test_set.numbers, features, labels, [k], classes, size, cfg)[k]
    return {
        **scores_of(test_set, confusion),
        "k": k,
        "classes": classes,
        "size": size,
        "gallery_count": len(train_set) - len(train_set.damaged),
        "count": len(test_set) - len(test_set.damaged),
        "left_out": len(train_set.damaged) + len(test_set.damaged),
        "passed_over": train_set.passed_over + test_set.passed_over,
    }


def _square(image: np.ndarray, values: np.ndarray, size: int, cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [C, S, S], classes [S, S])."""
    image, values = resized(image, class_map(values, cfg), (size, size))
    return image.transpose(2, 0, 1), values


def majority(values: Tensor, grid: tuple[int, ...], classes: int) -> Tensor:
    """The most frequent class of the pixels [B, S, S] in each cell of a grid (h, w): long [B, h · w]. IGNORED counts as
    a class of its own; of several classes that are equally frequent, the smallest one."""
    h, w = grid
    b, height, width = values.shape
    cells = values.view(b, h, height // h, w, width // w).permute(0, 1, 3, 2, 4).reshape(b, h * w, -1).long()
    votes = torch.zeros(b, h * w, classes + 1, dtype=torch.long)
    votes.scatter_add_(2, cells + 1, torch.ones_like(cells))  # IGNORED is -1
    return votes.roll(-1, 2).argmax(2).add(1).remainder(classes + 1).sub(1)


def _gallery(pairs: Pairs, numbers: np.ndarray, classes: int, size: int, cfg: Config) -> tuple[Tensor, Tensor]:
    """(features [P, D], labels [P]) of random patches of the gallery, on the CPU."""
    per_image, rng = max(1, cfg.patches // len(numbers)), np.random.default_rng([cfg.seed, 1])
    features, labels = [], []
    for found in pairs.read_all(numbers, cfg.batch):
        if not found:
            continue
        squares = [_square(image, values, size, cfg) for image, values in found]
        tokens, grid = tokens_of(pairs.encoder, np.stack([image for image, _ in squares]))
        label = majority(torch.from_numpy(np.stack([values for _, values in squares])), grid, classes)
        for of_image, its_labels in zip(tokens.cpu(), label, strict=True):
            usable = np.flatnonzero(its_labels.numpy() != IGNORED)
            chosen = torch.from_numpy(np.sort(rng.permutation(usable)[:per_image]))
            features.append(of_image[chosen])
            labels.append(its_labels[chosen])
    out = torch.cat(features)[: cfg.patches], torch.cat(labels)[: cfg.patches]
    if not len(out[1]):
        raise UserError(f"{pairs.samples.names}: all pixels of its masks are ignored (patch_knn.ignore)")
    return out


def _confusions(
    pairs: Pairs,
    numbers: np.ndarray,
    features: Tensor,
    labels: Tensor,
    ks: list[int],
    classes: int,
    size: int,
    cfg: Config,
) -> dict[int, Tensor]:
    """{k: confusion matrix [K, K] of the pixels of these samples}."""
    out = {k: torch.zeros(classes, classes, dtype=torch.long) for k in ks}
    for found in pairs.read_all(numbers, cfg.batch):
        if not found:
            continue
        squares = [_square(image, values, size, cfg) for image, values in found]
        tokens, (h, w) = tokens_of(pairs.encoder, np.stack([image for image, _ in squares]))
        neighbours = labels[nearest(features, tokens.flatten(0, 1), max(ks))[1].cpu()]  # [B·h·w, k], nearest first
        for k in ks:
            votes = torch.zeros(len(neighbours), classes, dtype=torch.long)
            votes.scatter_add_(1, neighbours[:, :k], torch.ones_like(neighbours[:, :k]))
            predicted = votes.argmax(1).view(len(found), h, w)
            for one, (_, values) in zip(predicted, squares, strict=True):
                pixels = one.repeat_interleave(size // h, 0).repeat_interleave(size // w, 1)
                out[k] += confusion_of(pixels, values, classes)
    return out
