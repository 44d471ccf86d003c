"""Semantic segmentation with a linear head on the frozen patch features, as DINOv2 and DINOv3 report it for ADE20K.

The head is dropout of channels (0.1), batch norm and a 1 × 1 convolution, whose logits are resized to the pixels
(arXiv 2304.07193, 2508.10104). It is trained with AdamW and cross-entropy on random crops, while the encoder runs in
every step. For the score an image is covered by overlapping windows, whose logits are averaged. mIoU is the mean over
the classes of Σ intersections / Σ unions, where the sums run over all images; classes without a union are left out.

Shapes: B windows, D features, K classes, S the side of a window, h × w patches of a window, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Section, option
from common.errors import DataError
from data_pipeline.formats.pixel_maps import MASKS
from data_pipeline.views import dense_views
from data_pipeline.views.augmentations import Rng, resize
from data_pipeline.views.dense_views import random_crop, short_side
from eval import probe_training
from eval.dense_data import IGNORED, Pairs, whole_patches
from eval.features import Encoder
from eval.probe_training import Order, cosine, dropped_channels, tokens_of

NEEDS = "masks"
UNIT = "images"
VERSION = 1
WARMUP_FROM = 1e-6  # the learning rate at the first step, as a share of the highest one
DROPOUT = 0.1
CLASS_CHUNK = 16  # classes whose logits have the size of the mask at once


@dataclass
class Scored(Section):
    """Which pixels are scored, and how an image is covered by windows."""

    member: str = ""  # ending of the masks; empty: mask.png, seg.png, or png beside a JPEG
    ignore: list[int] = option(lambda: [255], low=0)  # numbers in masks of pixels that are not scored
    zero_is_void: bool = False  # number 0 is not scored either, and class n has the number n + 1, as in ADE20K
    size: int | None = option(None, low=1)  # side of a window in pixels; null: that of the model; DINOv3: 512
    stride: float = option(2 / 3, above=0, high=1)  # between two windows, as a share of the size; DINOv3: 341 of 512


@dataclass
class Config(Scored):
    classes: int | None = option(None, low=2)  # number of classes; null: the largest number in the gallery, plus 1
    layers: int = option(1, low=1)  # number of last blocks whose patch features are concatenated
    steps: int = option(40_000, low=1)
    warmup: int = option(1500, low=0)  # steps; at most a tenth of all steps
    batch: int = option(16, low=1)  # crops in a step
    rate: float = option(1e-3, above=0)  # learning rate
    decay: float = option(1e-3, low=0)  # weight decay
    seed: int = 0  # of the weights, the order, the crops and the dropout


class LinearHead(nn.Module):
    """Patch features [B, D, h, w] → logits [B, K, h, w]."""

    def __init__(self, dim: int, outputs: int, seed: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, outputs, 1)
        nn.init.normal_(self.conv.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises DataError if no sample holds both an image and a map."""
    Pairs(None, shards, cfg.member, MASKS, "segmentation.member")


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"miou", "pixel_accuracy", "classes", "size"}, and the numbers of images."""
    train_set, test_set = (
        Pairs(encoder, specs, cfg.member, MASKS, "segmentation.member") for specs in (gallery, query)
    )
    size = window_size(encoder, cfg)
    classes = cfg.classes or count_classes(train_set, cfg)
    head = fit(encoder, train_set, classes, size, cfg)
    return {
        **score(encoder, head, test_set, classes, size, cfg, cfg.layers),
        "gallery_count": len(train_set),
        "left_out": len(train_set.damaged | {-1 - n for n in test_set.damaged}),
        "passed_over": train_set.passed_over + test_set.passed_over,
    }


def score(
    encoder: Encoder, head: nn.Module, pairs: Pairs, classes: int, size: int, cfg: Scored, layers: int
) -> dict[str, float]:
    """{"miou", "pixel_accuracy", "classes", "size", "count"} of a head on all images."""
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    stride = max(1, round(cfg.stride * size))
    for found in pairs.read_all(pairs.numbers, 2):
        for image, values in found:
            logits = segment(encoder, head, image, size, stride, layers)
            confusion += confusion_of(upsampled_argmax(logits, values.shape), class_map(values, cfg), classes)
    count = len(pairs) - len(pairs.damaged)
    return {**scores_of(pairs, confusion), "classes": classes, "size": size, "count": count}


def window_size(encoder: Encoder, cfg: Scored, protocol: str = "segmentation") -> int:
    return whole_patches(cfg.size or encoder.image_size, encoder.patch_size, f"{protocol}.size")


def class_map(values: np.ndarray, cfg: Any) -> np.ndarray:
    """The classes of pixels, int32 [H, W]; IGNORED for those that are not scored."""
    return dense_views.class_map(values, cfg.ignore, cfg.zero_is_void, IGNORED)


def count_classes(pairs: Pairs, cfg: Any) -> int:
    """The largest class number in the masks, plus 1. This reads all of them."""
    largest = -1
    for found in pairs.read_all(pairs.numbers, 64):
        largest = max([largest, *(int(class_map(values, cfg).max()) for _, values in found)])
    if largest < 1:
        raise DataError(
            f"{pairs.samples.names}: its masks hold {largest + 1} classes, but two or more are needed; the numbers in"
            f" {pairs.protocol}.ignore = {cfg.ignore} are no classes"
        )
    if largest >= 4096:
        raise DataError(
            f"{pairs.samples.names}: its masks hold the class number {largest}; write {pairs.protocol}.member=…"
        )
    return largest + 1


def fit(encoder: Encoder, pairs: Pairs, classes: int, size: int, cfg: Config) -> LinearHead:
    """The head, trained on random crops of the gallery."""
    dim = maps_of(encoder, np.zeros((1, encoder.channels, size, size), encoder.dtype), cfg.layers).shape[1]
    head = LinearHead(dim, classes, cfg.seed).to(encoder.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=cfg.rate, weight_decay=cfg.decay)
    order = Order(pairs.numbers, cfg.seed)

    def schedule(step: int) -> None:
        factor = cosine(step, cfg.steps, min(cfg.warmup, cfg.steps // 10), WARMUP_FROM)
        optimizer.param_groups[0]["lr"] = cfg.rate * factor

    def read(number: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        image, values = pairs.read(number)
        return random_crop(image, class_map(values, cfg), (size, size), (0.5, 2.0), IGNORED, rng)

    def loss(step: int, found: list[Any]) -> Tensor:
        features = maps_of(encoder, np.stack([image for image, _ in found]), cfg.layers)  # [B, D, h, w]
        target = torch.from_numpy(np.stack([values for _, values in found])).long().to(encoder.device)
        if classes <= int(np.max([values.max() for _, values in found])):
            raise DataError(f"segmentation.classes = {classes}: the masks hold larger class numbers")
        features = features * dropped_channels(features.shape[:2], DROPOUT, (cfg.seed, step), features.device)
        logits = F.interpolate(head(features), size=(size, size), mode="bilinear", align_corners=False)
        total = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
        return total / (target != IGNORED).sum().clamp_min(1)

    def batches_from(first: int) -> Iterator[tuple[int, list[Any]]]:
        return probe_training.batches(read, order, cfg.batch, first, cfg.steps)

    state = probe_training.state_path(encoder, pairs.samples, "segmentation", VERSION, cfg)
    probe_training.train(head, optimizer, cfg.steps, batches_from, schedule, loss, state)
    return head


def maps_of(encoder: Encoder, images: np.ndarray, layers: int, class_token: bool = False) -> Tensor:
    """Patch features of images [B, C, S, S] as maps [B, layers · D, h, w], with class tokens [B, 2 · layers · D, h, w]."""
    tokens, grid = tokens_of(encoder, images, layers, class_token)
    return tokens.transpose(1, 2).unflatten(2, grid)


@torch.no_grad()
def segment(encoder: Encoder, head: nn.Module, image: np.ndarray, size: int, stride: int, layers: int) -> Tensor:
    """Logits [K, H', W'] of an image [H, W, C] whose short side is resized to `size`: the averages over windows."""
    resized = resize(image, short_side(image, size))

    def predict(windows: np.ndarray) -> Tensor:
        return head(maps_of(encoder, windows, layers))

    return slide(predict, resized.transpose(2, 0, 1), size, stride)


def slide(predict: Any, image: np.ndarray, size: int, stride: int, batch: int = 8) -> Tensor:
    """The average of what `predict` returns for the windows [B, C, size, size] that cover an image [C, H, W].

    Its maps [B, K, h, w] are resized to the windows. Returns [K, H, W].
    """
    _, height, width = image.shape
    corners = [(y, x) for y in _starts(height, size, stride) for x in _starts(width, size, stride)]
    sums: list[Tensor] = []  # [K, H, W], once K is known
    count = torch.zeros(height, width)
    for first in range(0, len(corners), batch):
        some = corners[first : first + batch]
        windows = np.stack([image[:, y : y + size, x : x + size] for y, x in some])
        maps = F.interpolate(predict(windows), size=windows.shape[-2:], mode="bilinear", align_corners=False)
        sums = sums or [maps.new_zeros(maps.shape[1], height, width)]
        for (y, x), one in zip(some, maps, strict=True):
            sums[0][:, y : y + size, x : x + size] += one
            count[y : y + size, x : x + size] += 1
    return sums[0] / count.to(sums[0].device)


def _starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows of `size` begin; the last one ends at the end."""
    count = max(0, -(-(length - size) // stride)) + 1
    return [max(0, min(n * stride, length - size)) for n in range(count)]


def upsampled_argmax(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The class [H, W], on the CPU, with the largest of the logits [K, h, w] resized to `shape`. Only CLASS_CHUNK
    classes have this size at once."""
    best = None
    for first in range(0, len(logits), CLASS_CHUNK):
        part = logits[None, first : first + CLASS_CHUNK]
        values, classes = F.interpolate(part, size=shape, mode="bilinear", align_corners=False)[0].max(0)
        if best is None:
            best, chosen = values, classes
        else:
            chosen = torch.where(values > best, classes + first, chosen)
            best = torch.maximum(values, best)
    return chosen.cpu()


# ---------------------------------------------------------------- scores
def confusion_of(predicted: Tensor, truth: np.ndarray, classes: int) -> Tensor:
    """long [K, K]: the number of pixels of each class (row) that are predicted as each class (column)."""
    target = torch.from_numpy(truth).long()
    is_scored = (target >= 0) & (target < classes)
    pairs = target[is_scored] * classes + predicted[is_scored]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores_of(pairs: Pairs, confusion: Tensor) -> dict[str, float]:
    """`scores`. Raises DataError if no pixel of the masks has a class."""
    if not confusion.any():
        raise DataError(
            f"{pairs.samples.names}: no pixel of the masks has a class from 0 to {len(confusion) - 1}, so there is nothing"
            " to score; compare the numbers in the masks with the options `ignore` and `zero_is_void`"
        )
    return scores(confusion)


def scores(confusion: Tensor) -> dict[str, float]:
    """{"miou", "pixel_accuracy"} of a confusion matrix [K, K]."""
    matrix = confusion.double()
    hits = matrix.diagonal()
    unions = matrix.sum(0) + matrix.sum(1) - hits
    iou = hits / unions  # NaN for a class that occurs neither in the masks nor in the predictions
    return {"miou": iou.nanmean().item(), "pixel_accuracy": (hits.sum() / matrix.sum()).item()}
