"""Views of an image and its caption, for methods that compare the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops

CAPTIONS = MASKS + 1  # the number of the generator that draws one of several captions


class ImageText:
    """One crop of the image, "image" uint8 [C, S, S], and what `tokens` makes of its caption, for samples with the parts
    "image" and "text".

    `tokens`: a `CaptionTokens` (data_pipeline/parts/caption.py). `dropped`: the share of the patches that the model
    does not see; if it is not 0, "keep", int64 [K], has the others. `further`: views of the image in addition, as for
    `crops`.
    """

    def __init__(
        self,
        augment: Augment,
        patch_size: int,
        tokens: Callable[[Any, np.random.Generator], dict[str, np.ndarray]],
        dropped: float,
        further: dict[str, list[Augment]] | None = None,
    ):
        self.further = further or {}
        self.augment, self.tokens = augment, tokens
        self.patches = (augment.size // max(1, patch_size)) ** 2
        self.kept = max(1, round(self.patches * (1 - dropped))) if dropped else self.patches

    def __call__(self, sample: dict[str, Any], rng: Rng) -> dict[str, np.ndarray]:
        arrays = crops(sample, {"image": self.augment, **self.further}, rng) | self.tokens(
            sample["text"], rng(CAPTIONS)
        )
        if self.kept < self.patches:
            arrays["keep"] = rng(MASKS).random(self.patches).argsort()[: self.kept]
        return arrays
