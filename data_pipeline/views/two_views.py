"""Two views of an image with the augmentations of BYOL (arXiv 2006.07733, appendix B), which Barlow Twins, VICReg and
MoCo v3 use, too.

`cfg` is an objective's Config with the fields of `TwoViews` (pretrain/objectives/options.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipeline.views.augmentations import Augment, Rng, crops


def two_views(cfg: Any, image_size: int) -> Callable[[dict[str, Any], Rng], dict[str, np.ndarray]]:
    """The views of a sample: {"image": [2, C, S, S]}, with S = `image_size`."""
    common = {"jitter": tuple(cfg.jitter), "gray": 0.2, "flip": cfg.flip}
    first, second = (
        Augment(image_size, (cfg.crop_scale, 1.0), blur=blur, solarize=solarize, **common)
        for blur, solarize in zip(cfg.blur, cfg.solarize, strict=True)
    )

    def view(sample: dict[str, Any], rng: Rng) -> dict[str, np.ndarray]:
        return crops(sample, {"image": [first, second]}, rng)

    return view
