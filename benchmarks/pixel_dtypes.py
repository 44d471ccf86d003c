"""CPU time of the views of one decoded image of 512 pixels in uint8, uint16 and float32, in one interleaved run on one
thread: two crops of 224 and eight of 96 pixels with jitter, grey and blur.

    python benchmarks/pixel_dtypes.py

    pixels.{3,7}_channels.{uint16,float32}    CPU time, relative to uint8; `versus`: milliseconds of both
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from steps import emit

from data_pipeline.formats.pixels import PIXEL_DTYPES, converted
from data_pipeline.views.augmentations import Augment, crops, generators

ROUNDS, IMAGES = 9, 4
COLORS: dict[str, Any] = {"jitter": (0.4, 0.4, 0.2, 0.1), "gray": 0.2, "blur": 0.5}
VIEWS = {
    "large": [Augment(224, (0.3, 1.0), **COLORS)] * 2,
    "small": [Augment(96, (0.05, 0.3), **COLORS)] * 8,
}


def main() -> None:
    rng = np.random.default_rng(0)
    for channels in (3, 7):
        coarse = rng.integers(0, 256, (64, 64, channels), dtype=np.uint8)
        image = cv2.resize(coarse, (512, 512), interpolation=cv2.INTER_LINEAR)
        images = {dtype: converted(image, 8, dtype) for dtype in PIXEL_DTYPES}
        spent: dict[str, list[float]] = {dtype: [] for dtype in PIXEL_DTYPES}
        for each in range(ROUNDS):
            for dtype, pixels in images.items():
                start = time.process_time()
                for n in range(IMAGES):
                    crops({"image": pixels}, VIEWS, generators((each, n)))
                spent[dtype].append((time.process_time() - start) / IMAGES * 1e3)
        bytes_ms = median(spent["uint8"])
        for dtype in PIXEL_DTYPES[1:]:
            own = median(spent[dtype])
            emit(f"pixels.{channels}_channels.{dtype}", own / bytes_ms, "ratio", f"{own:.1f} and {bytes_ms:.1f} ms")


if __name__ == "__main__":
    main()
