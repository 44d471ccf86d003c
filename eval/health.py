"""Health of features without any labels: whether they use their dimensions, and tell images apart.

All numbers are computed from a fixed sample of images, so that exports of a run can be compared:

    rankme      effective rank of the features, exp(entropy of the normalised singular values); larger is better, at
                most the number of features (RankMe, arXiv 2210.02885). It falls when features collapse
    lidar       effective rank of the variance between images relative to that between random crops of an image: the
                rank of linear discriminant analysis with each image as a class (LiDAR, 2312.04000); larger is better.
                Directions that tell only crops apart count for rankme, but not for lidar
    alpha       exponent of the power law λᵢ ∝ i^−α of the eigenvalues of the covariance; about 1 is good, a larger one
                says that few directions hold all variance (α-ReQ, 2202.05808)
    std         mean standard deviation of a normalised feature, times √D: 1 for features that fill the sphere evenly, 0
                for a collapse to one point (SimSiam, 2011.10566)
    alignment   mean squared distance of two random crops of an image, for normalised features; small is good
    uniformity  log of the mean of exp(−2 ‖x − y‖²) over pairs of images; small is good (Wang & Isola, 2005.10242)
    patch_similarity   mean cosine similarity of two patches of an image. It rises when dense features degrade, the
                failure that Gram anchoring cures (DINOv3, 2508.10104)

No number alone says that a model is good: compare them between exports, and with the untrained network. The training
data need no labels: name it as query. Shapes: N images, V crops of an image, D features, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Section, option
from common.errors import Damaged, DataError, UserError
from data_pipeline.views.augmentations import Augment, center, generators
from eval.feature_cache import read_batches
from eval.features import Encoder
from eval.probe_training import tokens_of

NEEDS = "images"
VERSION = 1
EPSILON = 1e-5  # added to the normalised singular values
LIDAR_EPSILON = 1e-7  # added to the normalised eigenvalues
LIDAR_DELTA = 1e-4  # added to the variance within images in every direction
FIRST_EIGENVALUE, LAST_SHARE = 3, 0.5  # the power law is fitted from this eigenvalue to this share of all
MIN_SAMPLES = 16
MIN_EIGENVALUES = 8  # with fewer, no power law is fitted
PAIR_CHUNK = 1024  # rows whose distances to all others are computed at once


@dataclass
class Config(Section):
    samples: int = option(1024, low=MIN_SAMPLES)  # number of images, spread evenly over the set
    scale: float = option(0.4, above=0, below=1)  # least share of the image's area in a random crop
    crops: int = option(4, low=2)  # number of random crops of each image; the paper of LiDAR takes 50
    seed: int = 0  # of the random crops


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"rankme", "lidar", "alpha" (for MIN_EIGENVALUES features or more), "std", "alignment", "uniformity", "patch_similarity"}
    of the query, or of the gallery if no query is named."""
    if encoder.unit != "images":
        raise UserError(f"{encoder.name}: health measures models that read images, but this one reads {encoder.unit}")
    if not (specs := query or gallery):
        raise DataError("no shards are named for health; write query=SHARDS, for example the training data")
    samples, size = encoder.check(specs), encoder.image_size
    numbers = np.linspace(0, len(samples) - 1, min(cfg.samples, len(samples))).round().astype(int)
    crop = Augment(size, (cfg.scale, 1.0))

    def read(number: int) -> np.ndarray | Damaged:
        """The center crop and the random crops of an image, [1 + V, C, S, S]."""
        try:
            image = encoder.image(samples, int(number))
        except Damaged as reason:
            return reason
        rng = generators((cfg.seed, int(number)))
        drawn = (crop.draw(image.shape[:2], rng(k)) for k in range(cfg.crops))
        return np.stack([center(image, size), *(crop.apply(image, each) for each in drawn)])

    features: list[list[Tensor]] = [[] for _ in range(1 + cfg.crops)]
    similarities: list[Tensor] = []
    for _, found in read_batches(read, numbers, encoder.batch):  # type: ignore[arg-type]
        usable: list[Any] = [views for views in found if not isinstance(views, Damaged)]
        if usable:
            for n, views in enumerate(np.stack(usable, 1)):
                features[n].append(encoder.pooled(views))
            similarities.append(patch_similarity(tokens_of(encoder, np.stack(usable)[:, 0])[0]).cpu())
    count = sum(map(len, similarities))
    if count < MIN_SAMPLES:
        raise DataError(f"{samples.names}: {count} images can be read, but {MIN_SAMPLES} are needed")
    x, *views = (torch.cat(each).double() for each in features)
    if not x.isfinite().all():
        raise DataError(f"{encoder.name}: its features are not finite; its weights may not be finite, either")
    return {
        "rankme": rankme(x),
        "lidar": lidar(torch.stack(views, 1)),
        **({"alpha": alpha(x)} if min(x.shape[1], len(x) - 1) >= MIN_EIGENVALUES else {}),
        "std": F.normalize(x, dim=1).std(0, correction=0).mean().item() * x.shape[1] ** 0.5,
        "alignment": alignment(views[0], views[1]),
        "uniformity": uniformity(x),
        "patch_similarity": torch.cat(similarities).mean().item(),
        "count": count,
        "left_out": len(numbers) - count,
    }


def rankme(x: Tensor) -> float:
    """The effective rank of features [N, D]."""
    values = torch.linalg.svdvals(x)
    p = values / values.sum().clamp_min(1e-12) + EPSILON
    return (-(p * p.log()).sum()).exp().item()


def lidar(views: Tensor) -> float:
    """The effective rank of Σ_w^−½ Σ_b Σ_w^−½ for features [N, V, D] of V crops of N images, where Σ_b is the covariance
    of the means of images, and Σ_w the mean covariance of the crops of an image plus LIDAR_DELTA in its diagonal."""
    means = views.mean(1)  # [N, D]
    apart, within = means - means.mean(0), (views - means.unsqueeze(1)).flatten(0, 1)  # [N, D], [N·V, D]
    of_crops = within.T @ within / len(within)  # [D, D]
    of_crops.diagonal().add_(LIDAR_DELTA)
    # The singular values of L⁻¹ Aᵀ, for Σ_w = L Lᵀ and Σ_b = Aᵀ A, are the roots of the eigenvalues.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(of_crops), apart.T / len(apart) ** 0.5, upper=False)
    values = torch.linalg.svdvals(whitened).square()
    p = values / values.sum().clamp_min(1e-30) + LIDAR_EPSILON
    return (-(p * p.log()).sum()).exp().item()


def alpha(x: Tensor) -> float:
    """The exponent of the power law of the eigenvalues of the covariance of features [N, D], by least squares of their
    logarithms."""
    values = torch.linalg.svdvals(x - x.mean(0)).square() / len(x)  # descending
    last = max(FIRST_EIGENVALUE + 2, int(LAST_SHARE * min(x.shape[1], len(x) - 1)))
    values = values[FIRST_EIGENVALUE - 1 : last].clamp_min(1e-30)
    index = torch.arange(FIRST_EIGENVALUE, FIRST_EIGENVALUE + len(values), dtype=x.dtype).log()
    centred = index - index.mean()
    return -((centred * values.log()).sum() / centred.square().sum()).item()


def alignment(x: Tensor, y: Tensor) -> float:
    """The mean squared distance of the normalised features [N, D] of two crops of the same images."""
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean().item()


def uniformity(x: Tensor) -> float:
    """The logarithm of the mean Gaussian potential of pairs of normalised features [N, D]."""
    x, total = F.normalize(x, dim=1), 0.0
    for part in x.split(PAIR_CHUNK):
        total += (4 * (part @ x.T - 1)).exp().sum().item()  # exp(−2 ‖x − y‖²), as ‖x − y‖² = 2 − 2 x·y
    return float(np.log((total - len(x)) / (len(x) * (len(x) - 1))))


def patch_similarity(tokens: Tensor) -> Tensor:
    """The mean cosine similarity [B] of two different patches of patch features [B, P, D]; 1 if there is one patch."""
    count = tokens.shape[1]
    if count == 1:
        return tokens.new_ones(len(tokens))
    total = F.normalize(tokens, dim=2).sum(1).square().sum(1)  # Σ over all pairs, P of which are of a patch with itself
    return (total - count) / (count * (count - 1))
