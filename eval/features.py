"""Features of labelled images from a frozen encoder. They are computed once for each set.

Protocols get an `Encoder` for an exported folder, or for raw pixels as a baseline. Shapes: N images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import Absent, Damaged, DataError, UserError
from data_pipeline.formats.decode_budget import Budget
from data_pipeline.formats.image_formats import IMAGE_MEMBERS
from data_pipeline.parts.image import Image
from data_pipeline.shards.samples import Samples
from data_pipeline.views.augmentations import center
from eval.texts import Labelled, TextEncoder, bytes_of, name_of
from pretrain.models.layers import Features
from pretrain.parallel.device import pick_device


class Encoder:
    """A frozen backbone with its normalisation of pixels (`mean`, `std`) and its pooling.

    `backbone` is a `Backbone`, or any function from normalised images [B, C, S, S] to `Features`. `name`: the model's
    name in result rows.
    """

    unit = "images"  # the word for samples in messages and results

    def __init__(
        self,
        backbone: Any,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        pool: str = "cls",
        device: str = "auto",
    ):
        self.backbone, self.name, self.image_size, self.pool = backbone, name, image_size, pool
        self.mean, self.std = list(mean), list(std)
        self.part = Image(len(self.mean), mean=self.mean, std=self.std)
        self.channels = len(self.mean)
        self.device = pick_device(device, key="eval.device")
        if isinstance(backbone, torch.nn.Module):
            backbone.to(self.device).eval()
        self._labelled: dict[tuple[str, ...], Labelled] = {}

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images [B, C, H, W], on the device."""
        return self.backbone(self.part.place(torch.from_numpy(images), self.device))

    def pooled(self, images: np.ndarray) -> Tensor:
        """One vector per image [B, D]: the class token, or the mean of the patches."""
        features = self(images)
        return (features.cls if self.pool == "cls" else features.tokens.mean(1)).float().cpu()

    def labelled(self, specs: Sequence[str], batch: int = 64) -> Labelled:
        """Features and labels of all images in the shards, in order. Damaged images and samples without an image are
        left out."""
        key = tuple(specs)
        if key not in self._labelled:
            images, labels, left_out, absent = load_images(specs, self.image_size, self.channels)
            features = torch.cat([self.pooled(images[i : i + batch]) for i in range(0, len(images), batch)])  # [N, D]
            hashes = Samples(specs).hashes(IMAGE_MEMBERS)
            self._labelled[key] = Labelled(features, labels, left_out, absent, hashes)
        return self._labelled[key]


def load_images(specs: Sequence[str], size: int, channels: int = 3) -> tuple[np.ndarray, list[str], int, int]:
    """(center crops uint8 [N, channels, size, size], labels, number of damaged images, number of samples without an
    image)."""
    if not specs:
        raise DataError(
            "no labelled shards are named; write eval.gallery=… and eval.test=… (or gallery=… query=… for `unlabeled"
            " eval`)"
        )
    samples, budget = Samples(specs), Budget()

    def read(number: int) -> tuple[np.ndarray, str] | Damaged:
        try:
            with budget.lease() as take:
                return center(samples.image(number, channels, take), size), samples.label(number)
        except Damaged as reason:
            return reason

    with ThreadPool() as pool:
        pairs = pool.map(read, range(len(samples)))
    readable = [pair for pair in pairs if not isinstance(pair, Damaged)]
    absent = sum(isinstance(pair, Absent) for pair in pairs)  # a kind of Damaged
    damaged = len(pairs) - len(readable) - absent
    if not readable:
        raise DataError(f"{samples.names}: none of the {len(samples)} images can be read")
    return np.stack([image for image, _ in readable]), [label for _, label in readable], damaged, absent


def _pixels(images: Tensor) -> Features:
    """Normalised pixels [B, C, S, S] as the features of images: [B, C·S·S]."""
    flat = images.flatten(1)
    return Features(flat, flat.unsqueeze(1), flat.unsqueeze(1)[:, :0], (1, 1))


def open_encoder(model: str, image_size: int | None = None, device: str = "auto") -> tuple[Any, dict[str, Any]]:
    """(an `Encoder` or `TextEncoder`, facts about it: step, pool, …) for an exported folder or a baseline.

    The baselines are "pixels", the pixels of an image of side 32, and "bytes", the byte frequencies of a text.
    `device`: cpu, cuda, cuda:1, …, or auto, the best one.
    """
    if model == "bytes":
        return TextEncoder(bytes_of, "bytes", device=device), {"step": 0}
    if model == "pixels":
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        return Encoder(_pixels, "pixels", 32, mean, std, device=device), {"step": 0}
    from pretrain.interchange.export import load

    backbone, facts = load(Path(model))
    name = name_of(facts)
    if backbone.cfg.reads == "tokens":
        return TextEncoder(backbone, name, Path(model), facts.get("pool", "mean"), device), facts
    if backbone.cfg.reads != "image":
        raise UserError(f"{model}: reads {backbone.cfg.reads}, but the protocols score models that read images or text")
    mean, std, channels = facts["mean"], facts["std"], backbone.cfg.in_channels
    if not all(values and len(values) == channels for values in (mean, std)):
        raise DataError(
            f"{model}: mean and std are {[mean, std]}, but its images have {channels} channels; export it again"
        )
    size = image_size or backbone.image_size
    return Encoder(backbone, name, size, mean, std, facts.get("pool", "cls"), device), facts
