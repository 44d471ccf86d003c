"""An image: decoded when the views ask for its pixels, and normalised on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from data_pipeline.formats.decode import Encoded
from data_pipeline.formats.decode_budget import DECODE_MB
from data_pipeline.formats.image_formats import IMAGE_MEMBERS, MAX_PIXELS
from data_pipeline.formats.pixels import PIXEL_DTYPES, PixelDtype, converted
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.samples import Samples
from data_pipeline.views import device_color
from data_pipeline.views.device_color import Constants


@dataclass
class Image(Part):
    """An image is decoded to an `Encoded`, from which `crops` makes views of `dtype`. On the device they become float32,
    (x / 255 − mean) / std; for uint16 with 65,535 instead of 255, and for float32 with 1."""

    channels: int = 3
    color: str = "exact"  # or "fused", "device": see `data_pipeline/views/colors.py`
    mean: Sequence[float] = (0.5, 0.5, 0.5)  # of each channel, for pixels from 0 to 1
    std: Sequence[float] = (0.25, 0.25, 0.25)
    max_pixels: int = MAX_PIXELS
    decode_mb: float = DECODE_MB  # type: ignore[misc]  # `data.decode_mb` of the recipe
    dtype: PixelDtype = "uint8"  # of the views
    # made when the first tensor of this dtype is placed on the device
    _constants: dict[tuple[torch.device, torch.dtype], Constants] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    extensions = IMAGE_MEMBERS

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_constants": {}}  # a data worker, which gets a copy, has no device

    def configured(self, data: Any, model: Any) -> Self:
        channels = model.in_channels
        for key, values in (("mean", data.mean), ("std", data.std)):
            if len(values) != channels:
                raise ConfigError(
                    f"data.{key} = {values}: model.in_channels = {channels}, so write {channels} values, such as those"
                    " that `unlabeled shards stats` prints for images of many channels"
                )
        return dataclasses.replace(
            self,
            channels=channels,
            color=data.color,
            mean=data.mean,
            std=data.std,
            max_pixels=data.max_pixels,
            decode_mb=data.decode_mb,
            dtype="uint8" if data.pixel_dtype == "auto" else data.pixel_dtype,  # auto: a plan, which has no data
        )

    def open(self, specs: Sequence[str], held_out: bool = False, extensions: Sequence[str] = ()) -> Dataset:
        return Samples(specs, max_pixels=self.max_pixels, further=extensions)

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        facts = {"channels": self.channels, "mean": tuple(self.mean), "std": tuple(self.std)}
        return facts | {"pixel_dtype": self.dtype}

    def stored_pixels(self, datasets: Sequence[Dataset]) -> str:
        found = {dataset.stored_dtype() for dataset in datasets if isinstance(dataset, Samples)}
        return max(found, key=PIXEL_DTYPES.index, default="uint8")

    def facts(self) -> dict[str, Any]:
        return {} if self.dtype == "uint8" else {"pixel_dtype": self.dtype}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> Encoded:
        extension = next(e for e in IMAGE_MEMBERS if e in members)
        return Encoded(
            members[extension],
            extension,
            self.channels,
            **known.get("pixels", {}),
            max_pixels=self.max_pixels,
            color=self.color,
            dtype=self.dtype,
        )

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        side = max(64, int(1.2 * about.image_size))
        pixels = rng.integers(0, 256, (side, side, self.channels), dtype=np.uint8)
        return {name: converted(pixels, 8, self.dtype)}

    def place(self, tensor: Tensor, device: torch.device, **extras: Tensor) -> Tensor:
        """[..., C, H, W] of uint8, uint16 or float32 → float32 of the same shape.

        extras["color"] [..., 6]: the parameters of colour operations that run on the device, see `color_row`.
        """
        key = device, tensor.dtype
        if key not in self._constants:
            self._constants[key] = device_color.constants(self.mean, self.std, *key)
        images = tensor.to(device, non_blocking=True)
        if "color" in extras:
            rows = extras["color"].to(device, non_blocking=True)
            images = device_color.apply(images, rows, self._constants[key])
        return device_color.normalize(images, self._constants[key])
