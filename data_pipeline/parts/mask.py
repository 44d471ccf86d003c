"""A mask: the number of the class of each pixel of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.formats.pixel_maps import MASKS, read_map
from data_pipeline.parts.part import About, Part


@dataclass
class Mask(Part):
    """A mask is decoded to int32 [H, W], or floats, the numbers in the file. Its member is named as for the evaluation
    of segmentation: `mask.png` or `seg.png`, one channel or a palette, or `.npy` instead of `.png`."""

    extensions = MASKS

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> np.ndarray:
        ending = next(e for e in MASKS if e in members)
        return read_map(members[ending], ending)

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        side = max(64, int(1.2 * about.image_size))  # as the image that stands in
        return {name: rng.integers(0, 2, (side, side), dtype=np.int32)}
