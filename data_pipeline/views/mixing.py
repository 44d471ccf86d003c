"""The random numbers of mixup (arXiv 1710.09412) and CutMix (1905.04899). Data workers draw them, and the images are
mixed on the device.

Samples are mixed in pairs: those in the slots 2k and 2k + 1 of the global batch, each with the other one, with the same
numbers. So the result depends neither on the number of processes nor on that of micro-batches, as long as both samples
of a pair are in one micro-batch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from data_pipeline.order.permutation import hash_to_key
from data_pipeline.views.augmentations import generators

PAIR_KEY = 13  # hashed into the key of a step, so that it differs from other keys of the seed


def pair_numbers(sample: dict[str, Any], size: int, blended: float, pasted: float) -> dict[str, np.ndarray]:
    """The numbers with which a sample is mixed with the other one of its pair.

    mix_share  float32 [2]  the share that the sample keeps: of its pixels outside of the box, and of its label
    mix_box    int64 [4]    top, bottom, left, right of the pixels that are those of the other sample

    `blended` and `pasted` are the parameters α of mixup and of CutMix, whose share λ is drawn from Beta(α, α); 0: never.
    If neither is 0, each has probability 0.5. `size`: side of the image in pixels.
    """
    rng = generators((hash_to_key(sample["seed"], PAIR_KEY, sample["step"]), sample["slot"] // 2))(0)
    paste = bool(pasted) and (not blended or rng.random() < 0.5)
    alpha = pasted if paste else blended
    share = float(rng.beta(alpha, alpha)) if alpha else 1.0
    box = [0, 0, 0, 0]
    pixels = share
    if paste:
        side = int(size * math.sqrt(1 - share))
        y, x = rng.integers(0, size, 2).tolist()  # the centre, so that a part of the box may lie outside
        box = [y - side // 2, y + (side + 1) // 2, x - side // 2, x + (side + 1) // 2]
        box = [min(max(edge, 0), size) for edge in box]
        pixels, share = 1.0, 1 - (box[1] - box[0]) * (box[3] - box[2]) / size**2
    return {"mix_share": np.array([pixels, share], np.float32), "mix_box": np.array(box, np.int64)}
