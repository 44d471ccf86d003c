"""Depth estimation with a linear head on the frozen patch features, as DINOv2 and DINOv3 report it for NYUv2.

The head is batch norm and a 1 × 1 convolution to 256 bins, which are spaced evenly in the range of depths (arXiv
2304.07193, 2508.10104; bins: AdaBins, 2011.14141). The depth of a patch is the mean of the bins with the weights

    w = (relu(x) + 0.1) / Σ (relu(x) + 0.1)

and is resized to the pixels. The loss is that of Eigen et al. (arXiv 1406.2283) as BTS writes it (1907.10326):

    √( var(g) + 0.15 · mean(g)² ),   g = log(predicted + 0.001) − log(true + 0.001)

with the term of the mean only for the first 100 steps (in trainings of less than 1,000 steps: for the first tenth; this
term alone fits one number, the scale of all depths). Training crops and images of the score have the size at which they
are stored. For the score an image is padded to whole patches, and the predictions for it and for its mirror image are
averaged. Metrics are computed for each image and averaged over images.

Shapes: B crops, D features, h × w patches, H × W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Section, option
from common.errors import DataError
from data_pipeline.formats.pixels import rounded
from data_pipeline.views.augmentations import Rng
from data_pipeline.views.dense_views import random_crop
from eval import probe_training
from eval.dense_data import DEPTHS, Pairs, whole_patches
from eval.features import Encoder
from eval.probe_training import Order
from eval.segmentation import LinearHead, maps_of

NEEDS = "depth"
UNIT = "images"
VERSION = 2
BINS = 256
MEAN_WEIGHT = 0.15
MEAN_ONLY_STEPS = 100  # at most a tenth of all steps
OFFSET = 1e-3  # metres, added before the logarithm
MAX_NORM = 35.0  # of the gradients
START_SHARE, END_SHARE = 1 / 25, 1 / 25_000  # of the highest learning rate: at the first and the last step
MOMENTUM = 0.95, 0.85  # β₁ of AdamW: at the lowest and at the highest learning rate
ROTATION = 2.5  # degrees
BRIGHTNESS = 0.75, 1.25
EIGEN_CROP = slice(45, 471), slice(41, 601)  # the pixels of NYUv2 (480 × 640) that are scored


@dataclass
class Config(Section):
    member: str = ""  # ending of the depth maps; empty: depth.png, depth.npy, or png beside a JPEG
    scale: float = option(0.001, above=0)  # metres of one unit, in maps of whole numbers; floats are metres
    nearest: float = option(0.001, above=0)  # metres; nearer pixels are not scored
    farthest: float = option(10.0, above=0)  # metres; farther pixels are not scored
    eigen_crop: bool = False  # score the part of NYUv2's images that is usual for it
    height: int | None = option(None, low=1)  # of training crops in pixels; null: that of the model; DINOv3: 416
    width: int | None = option(None, low=1)  # of training crops in pixels; null: that of the model; DINOv3: 544
    layers: int = option(1, low=1)  # number of last blocks whose patch features are concatenated
    class_token: bool = False  # concatenate the class token of these blocks to each patch, as DINOv2; DINOv3 does not
    steps: int = option(38_400, low=4)
    batch: int = option(16, low=1)  # crops in a step
    rate: float = option(3e-4, above=0)  # highest learning rate, which is reached after a third of the steps
    decay: float = option(1e-4, low=0)  # weight decay
    seed: int = 0  # of the weights, the order and the crops

    def check(self) -> None:
        if self.nearest >= self.farthest:
            raise ValueError(f"nearest = {self.nearest} must be less than farthest = {self.farthest}")


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises DataError if no sample holds both an image and a map."""
    Pairs(None, shards, cfg.member, DEPTHS, "depth.member")


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"rmse" (metres), "abs_rel", "delta1", "delta2", "delta3", "silog", "log10"}, and the numbers of images."""
    train_set, test_set = (Pairs(encoder, specs, cfg.member, DEPTHS, "depth.member") for specs in (gallery, query))
    head = fit(encoder, train_set, cfg)
    found: list[dict[str, float]] = []
    for pairs in test_set.read_all(test_set.numbers, 2):
        for image, values in pairs:
            truth = metres(values, cfg)
            if cfg.eigen_crop:
                part = np.zeros_like(truth)
                part[EIGEN_CROP] = truth[EIGEN_CROP]
                truth = part
            if truth.any():
                found.append(errors(predict(encoder, head, image, cfg), torch.from_numpy(truth)))
    if not found:
        raise DataError(
            f"{test_set.samples.names}: no depth is between depth.nearest = {cfg.nearest} and depth.farthest ="
            f" {cfg.farthest} metres; whole numbers are multiplied by depth.scale = {cfg.scale}"
        )
    return {
        **{key: float(np.mean([each[key] for each in found])) for key in found[0]},
        "gallery_count": len(train_set),
        "count": len(found),
        "left_out": len(test_set.damaged),
        "passed_over": train_set.passed_over + test_set.passed_over,
    }


def metres(values: np.ndarray, cfg: Config) -> np.ndarray:
    """Depths [H, W] in metres, fp32; 0 where there is none in the range that is scored."""
    out = values.astype(np.float32) * (cfg.scale if values.dtype.kind in "ui" else 1)
    with np.errstate(invalid="ignore"):
        return np.where((out >= cfg.nearest) & (out <= cfg.farthest), out, 0).astype(np.float32)


def depth_of(logits: Tensor, cfg: Config) -> Tensor:
    """Depths [B, 1, h, w] in metres from logits [B, BINS, h, w]."""
    bins = torch.linspace(cfg.nearest, cfg.farthest, BINS, device=logits.device)
    weights = logits.relu() + 0.1
    return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), bins).unsqueeze(1)


def sig_loss(predicted: Tensor, truth: Tensor, mean_only: bool = False) -> Tensor:
    """The loss of predicted and true depths, two vectors in metres."""
    g = (predicted + OFFSET).log() - (truth + OFFSET).log()
    spread = g.new_zeros(()) if mean_only or len(g) < 2 else g.var()
    return (spread + MEAN_WEIGHT * g.mean().square()).clamp_min(1e-12).sqrt()


def fit(encoder: Encoder, pairs: Pairs, cfg: Config) -> LinearHead:
    """The head, trained on random crops of the gallery."""
    size = (
        whole_patches(cfg.height or encoder.image_size, encoder.patch_size, "depth.height"),
        whole_patches(cfg.width or encoder.image_size, encoder.patch_size, "depth.width"),
    )
    dim = maps_of(encoder, np.zeros((1, encoder.channels, *size), encoder.dtype), cfg.layers, cfg.class_token).shape[1]
    head = LinearHead(dim, BINS, cfg.seed).to(encoder.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=cfg.rate, betas=(0.9, 0.99), weight_decay=cfg.decay)
    order = Order(pairs.numbers, cfg.seed)

    def schedule(step: int) -> None:
        optimizer.param_groups[0]["lr"], momentum = one_cycle(step, cfg.steps, cfg.rate)
        optimizer.param_groups[0]["betas"] = (momentum, 0.99)

    def read(number: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        image, values = pairs.read(number)
        return training_view(image, metres(values, cfg), size, rng)

    def loss(step: int, found: list[Any]) -> Tensor:
        features = maps_of(
            encoder, np.stack([image for image, _ in found]), cfg.layers, cfg.class_token
        )  # [B, D, h, w]
        truth = torch.from_numpy(np.stack([depth for _, depth in found])).to(encoder.device)  # [B, H, W]
        depth = F.interpolate(depth_of(head(features), cfg), size=size, mode="bilinear", align_corners=False)[:, 0]
        is_known = truth > 0
        if not is_known.any():
            return depth.sum() * 0
        return sig_loss(depth[is_known], truth[is_known], step < min(MEAN_ONLY_STEPS, cfg.steps // 10))

    def batches_from(first: int) -> Iterator[tuple[int, list[Any]]]:
        return probe_training.batches(read, order, cfg.batch, first, cfg.steps)

    state = probe_training.state_path(encoder, pairs.samples, "depth", VERSION, cfg)
    probe_training.train(head, optimizer, cfg.steps, batches_from, schedule, loss, state, MAX_NORM)
    return head


def one_cycle(step: int, steps: int, rate: float) -> tuple[float, float]:
    """(learning rate, β₁): the rate rises for a third of the steps and then falls, both along a cosine."""
    peak = steps / 3 - 1
    if step <= peak:
        low, share = START_SHARE, (1 - math.cos(math.pi * step / peak)) / 2
    else:
        low, share = END_SHARE, (1 + math.cos(math.pi * (step - peak) / (steps - 1 - peak))) / 2
    return rate * (low + (1 - low) * share), MOMENTUM[0] + (MOMENTUM[1] - MOMENTUM[0]) * share


def training_view(
    image: np.ndarray, depth: np.ndarray, size: tuple[int, int], rng: Rng
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop [C, *size] of the augmented image and its depths [*size]. It is not scaled, because images are not
    scaled for the score either; an image that is smaller than the crop is padded."""
    image, depth = augmented(image, depth, rng)
    native = min(depth.shape) / min(size)
    return random_crop(image, depth, size, (native, native), 0, rng)


def augmented(image: np.ndarray, depth: np.ndarray, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """The image and its depths [H, W], with a probability of 0.5 rotated by up to ROTATION degrees; the brightness of
    the image is changed with a probability of 0.5. Depths outside of the rotated image are unknown, 0."""
    rotates, angle, brightens, factor = rng(1).random(4)
    if rotates < 0.5:
        height, width = depth.shape
        turn = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), ROTATION * (2 * angle - 1), 1.0)
        image = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR).reshape(image.shape)
        depth = cv2.warpAffine(depth, turn, (width, height), flags=cv2.INTER_NEAREST)
    if brightens < 0.5:
        factor = BRIGHTNESS[0] + (BRIGHTNESS[1] - BRIGHTNESS[0]) * factor
        image = rounded(image.astype(np.float32) * np.float32(factor), image.dtype)
    return image, depth


@torch.no_grad()
def predict(encoder: Encoder, head: nn.Module, image: np.ndarray, cfg: Config) -> Tensor:
    """Depths [H, W] in metres, on the CPU, of an image [H, W, C]: the mean of those of the image and of its mirror
    image."""
    height, width = image.shape[:2]
    missing = [-side % encoder.patch_size for side in (height, width)]
    top, left = missing[0] // 2, missing[1] // 2
    padded = np.pad(image, ((top, missing[0] - top), (left, missing[1] - left), (0, 0))).transpose(2, 0, 1)
    depths = []
    for each in (padded, padded[..., ::-1]):
        logits = head(maps_of(encoder, np.ascontiguousarray(each)[None], cfg.layers, cfg.class_token))
        depth = F.interpolate(depth_of(logits, cfg), size=padded.shape[-2:], mode="bilinear", align_corners=False)
        depths.append(depth[0, 0])
    depth = (depths[0] + depths[1].flip(1)) / 2
    return depth[top : top + height, left : left + width].clamp(cfg.nearest, cfg.farthest).cpu()


def errors(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """The metrics of one image, from depths [H, W] in metres; pixels whose true depth is 0 are left out."""
    p, t = predicted[truth > 0].double(), truth[truth > 0].double()
    ratio, g = torch.maximum(p / t, t / p), p.log() - t.log()
    variance = g.square().mean() - g.mean().square()
    return {
        "rmse": (p - t).square().mean().sqrt().item(),
        "abs_rel": ((p - t).abs() / t).mean().item(),
        **{f"delta{n}": (ratio < 1.25**n).double().mean().item() for n in (1, 2, 3)},
        "silog": 100 * variance.clamp_min(0).sqrt().item(),
        "log10": (g / math.log(10)).abs().mean().item(),
    }
