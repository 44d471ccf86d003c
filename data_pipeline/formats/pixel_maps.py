"""Maps of numbers beside an image, one for each pixel: masks of classes, and depth."""

from __future__ import annotations

import io

import numpy as np

from common.errors import Damaged
from data_pipeline.formats.image_formats import errors_as_damage
from data_pipeline.formats.pillow_images import open_image

MASKS = ("mask.png", "seg.png", "mask.npy", "seg.npy")  # endings by which masks are found, the first one that is there


def read_map(data: bytes, ending: str) -> np.ndarray:
    """The numbers [H, W] in a PNG of one channel or a palette, or in a .npy file. Raises Damaged."""
    if ending.rpartition(".")[2] == "npy":
        with errors_as_damage():
            values = np.load(io.BytesIO(data), allow_pickle=False)
        if values.ndim != 2 or values.dtype.kind not in "buif":
            raise Damaged(f"its map holds {values.dtype} {list(values.shape)}, but numbers [H, W] are read")
        return values
    with open_image(data) as image, errors_as_damage():
        image.load()
        mode, values = image.mode, np.asarray(image)
    if mode not in ("1", "L", "P", "I", "I;16"):
        raise Damaged(f"its map is a picture of {mode}, but one channel, or a palette, of numbers is read")
    return values.astype(np.int32)
