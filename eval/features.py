"""Features of labelled images from a frozen encoder, extracted once per set and kept.

Protocols see an `Encoder`: an exported folder, or raw pixels as the floor that every network has to beat. N images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import Damaged
from data_pipeline.shards import Samples
from data_pipeline.storage import DataError
from data_pipeline.stream import to_device
from data_pipeline.views import center
from eval.texts import Labelled, TextEncoder, bytes_of, name_of
from pretrain.models.layers import Features
from pretrain.models.text_layers import TextBackbone


class Encoder:
    """A frozen backbone with its own pixels' normalisation and pooling; `name` stands in result rows."""

    def __init__(
        self, backbone: Any, name: str, image_size: int, mean: Sequence[float], std: Sequence[float], pool: str = "cls"
    ):
        self.backbone, self.name, self.image_size, self.pool = backbone, name, image_size, pool
        self.mean, self.std = list(mean), list(std)
        self.channels = len(self.mean)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(backbone, torch.nn.Module):
            backbone.to(self.device).eval()
        self._kept: dict[tuple[str, ...], Labelled] = {}

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 images [B, 3, H, W], on the device."""
        batch = to_device({"image": torch.from_numpy(images)}, self.device, self.mean, self.std)
        return self.backbone(batch["image"])

    def pooled(self, images: np.ndarray) -> Tensor:
        """One vector per image [B, D]: the class token, or the mean of the patches."""
        features = self(images)
        return (features.cls if self.pool == "cls" else features.tokens.mean(1)).float().cpu()

    def labelled(self, specs: Sequence[str], batch: int = 64) -> Labelled:
        """Features and labels of all images in the shards, in order; damaged images are left out and counted."""
        key = tuple(specs)
        if key not in self._kept:
            images, labels, left_out = load_images(specs, self.image_size, self.channels)
            parts = [self.pooled(images[i : i + batch]) for i in range(0, len(images), batch)]
            self._kept[key] = Labelled(torch.cat(parts), labels, left_out)
        return self._kept[key]


def load_images(specs: Sequence[str], size: int, channels: int = 3) -> tuple[np.ndarray, list[str], int]:
    """(uint8 [N, channels, size, size] as evaluation sees them, labels, how many were damaged)."""
    if not specs:
        raise DataError(
            "no labelled shards are named; write eval.gallery=… and eval.test=… (or gallery=… query=… for `unlabeled eval`)"
        )
    samples = Samples(specs)

    def one(number: int) -> tuple[np.ndarray, str] | None:
        try:
            return center(samples.image(number, channels), size), samples.label(number)
        except Damaged:
            return None

    with ThreadPool() as pool:
        pairs = pool.map(one, range(len(samples)))
    good = [pair for pair in pairs if pair is not None]
    if not good:
        raise DataError(f"{samples.names}: none of the {len(samples)} images can be read")
    return np.stack([image for image, _ in good]), [label for _, label in good], len(pairs) - len(good)


def _pixels(images: Tensor) -> Features:
    flat = images.flatten(1)
    return Features(flat, flat.unsqueeze(1), flat.unsqueeze(1)[:, :0], (1, 1))


def open_encoder(model: str, image_size: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(`Encoder` or `TextEncoder`, what is known of it) for an exported folder, or for a word: "pixels", the image at 32 pixels, flat; "bytes", how often a
    text has each byte."""
    if model == "bytes":
        return TextEncoder(bytes_of, "bytes"), {"step": 0}
    if model == "pixels":
        return Encoder(_pixels, "pixels", 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), {"step": 0}
    from pretrain.export import load

    backbone, about = load(Path(model))
    name = name_of(about)
    if isinstance(backbone, TextBackbone):
        return TextEncoder(backbone, name, Path(model), about.get("pool", "mean")), about
    return Encoder(
        backbone, name, image_size or backbone.image_size, about["mean"], about["std"], about.get("pool", "cls")
    ), about
