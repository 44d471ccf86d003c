"""Robustness of a linear probe to the 15 corruptions of ImageNet-C at 5 levels (arXiv 1903.12261).

The probe of `linear` is trained on the gallery as it is; the queries are corrupted as `corruptions.py` says. The error
for a corruption is the mean over its levels. The mean corruption error (mCE) is the mean over corruptions of this error,
divided by AlexNet's for the same corruption of ImageNet, in percent; AlexNet has 100, and lower is better. It can only be
compared with published values for the classes of ImageNet; `corruption_error`, the mean without that division, can be
compared between models for any data.

Without corruptions (`corruptions: []`), the accuracy on the queries as they are is computed, for sets such as ImageNet-A,
-R, Sketch, V2 and ReaL; `label_files.py` says how a part of the classes, or several right labels, are named.

An image is cut to a square and resized to 224 pixels, corrupted, and resized to the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from common.config import option
from common.errors import Damaged, DataError, UserError, nearest
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center, resize
from eval import linear
from eval.corruptions import CORRUPTIONS, SIZE, corrupt
from eval.feature_cache import read_batches
from eval.feature_rows import Subset
from eval.features import Encoder
from eval.label_files import AnswerFiles, Answers, answers
from eval.text_features import TextEncoder

NEEDS = "labels"
VERSION = 1
ALL_LEVELS = [1, 2, 3, 4, 5]


@dataclass
class Config(AnswerFiles):
    corruptions: list[str] = option(lambda: list(CORRUPTIONS))  # names of the corruptions; []: only the clean accuracy
    levels: list[int] = option(lambda: list(ALL_LEVELS), low=1, high=5)  # strengths
    samples: int | None = option(None, low=1)  # number of queries that are corrupted, the first ones; null: all
    seed: int = 0  # of the random corruptions
    linear: linear.Config = field(default_factory=linear.Config)  # options of the probe

    def check(self) -> None:
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ValueError(f"corruptions: no {name!r}; {nearest(name, CORRUPTIONS)}")
        if not self.levels:
            raise ValueError("levels = []: write one level or more")


def layers(cfg: Config) -> int:
    return linear.layers(cfg.linear)


def run(encoder: Encoder | TextEncoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"corruption_error", "clean_error", "error_NAME" for each corruption}, and "mce" for all corruptions and levels;
    without corruptions {"accuracy", "clean_error"}. With `classes` or `labels` also {"scored": number of queries that
    count}."""
    if not isinstance(encoder, Encoder) or encoder.unit != "images" or encoder.channels != 3:
        raise UserError(f"{encoder.name}: robustness corrupts images with three channels")
    if encoder.dtype != "uint8":
        raise UserError(
            f"{encoder.name}: reads {encoder.dtype} pixels, but the corruptions of robustness are defined for uint8"
        )
    gallery_set, query_set = encoder.labelled(gallery), encoder.labelled(query)
    inputs = linear.inputs_of(encoder, cfg.linear)
    probe = linear.fit(
        gallery_set.stored(), gallery_set.classes, len(gallery_set.names), cfg.linear, encoder.device, inputs
    )
    samples, wrong = encoder.check(query), dict[str, float]()
    found = answers(cfg, gallery_set.names, query_set, samples, "robustness")
    found = Answers(found.allowed, found.rows[: cfg.samples], found.right[: cfg.samples])
    error = lambda predicted: 1 - found.correct(predicted).double().mean().item()  # noqa: E731
    clean = error(probe.predict(Subset(query_set.stored(), found.rows), found.allowed))
    numbers = query_set.numbers[found.rows.numpy()]
    for name in cfg.corruptions:
        errors = []
        for level in cfg.levels:
            errors.append(error(_predicted(encoder, samples, numbers, probe, found.allowed, name, level, cfg.seed)))
        wrong[name] = float(np.mean(errors))
    scored = {"scored": float(len(numbers))} if cfg.classes or cfg.labels else {}
    if not wrong:
        return {"accuracy": 1 - clean, "clean_error": clean} | scored
    scores = {"corruption_error": float(np.mean([*wrong.values()])), "clean_error": clean}
    if set(wrong) == set(CORRUPTIONS) and sorted(cfg.levels) == ALL_LEVELS:
        scores = {"mce": mean_corruption_error(wrong)} | scores
    return scores | scored | {f"error_{name}": value for name, value in wrong.items()}


def mean_corruption_error(errors: dict[str, float]) -> float:
    """mCE in percent, from the error for each of the corruptions."""
    return 100 * float(np.mean([error / CORRUPTIONS[name][1] for name, error in errors.items()]))


def _predicted(
    encoder: Encoder,
    samples: Samples,
    numbers: np.ndarray,
    probe: linear.Probe,
    allowed: Tensor | None,
    name: str,
    level: int,
    seed: int,
) -> Tensor:
    """The classes [N], among those that can be answered, that are predicted for corrupted images."""
    read = partial(_corrupted, encoder, samples, name, level, seed)
    out = []
    for _, found in read_batches(read, numbers, encoder.batch):  # type: ignore[arg-type]
        out.append(probe.predict(encoder.stored(found), allowed))
    return torch.cat(out)


def _corrupted(encoder: Encoder, samples: Samples, name: str, level: int, seed: int, number: int) -> np.ndarray:
    """One corrupted image, uint8 [3, S, S]."""
    rng = np.random.default_rng([seed, int(number), sorted(CORRUPTIONS).index(name), level])
    try:
        image = center(encoder.image(samples, int(number)), SIZE).transpose(1, 2, 0)
    except Damaged as reason:
        raise DataError(f"{samples.names}: sample {number} cannot be read any more ({reason}); run it again") from None
    size = encoder.image_size
    return np.ascontiguousarray(resize(corrupt(image, name, level, rng), (size, size)).transpose(2, 0, 1))
