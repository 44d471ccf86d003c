"""Fine-tuning for segmentation: a backbone and a linear head on its patches learn masks (arXiv 2304.07193).

    z_n = W f_n + b for each patch n, resized to the pixels (bilinear)
    loss = −Σ_p log softmax(z_p)[t_p], mean over the pixels p of the batch that have a class t_p

Images and masks are scaled by a factor in `zoom_range`, cropped and flipped together; pixels outside of the image have no
class. In the paper, the backbone is frozen. Here it is trained, from `init.backbone`, and `optim.layer_decay`,
`model.drop_path` and `optim.freeze_backbone` have the same meaning as for `finetune`. The export holds the head; the
protocol `segmenter` scores it.

Shapes: B images, C channels, S pixels per side, h × w patches of width D, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option
from common.errors import Damaged, DataError
from data_pipeline.formats.decode import Encoded
from data_pipeline.parts.image import Image
from data_pipeline.parts.mask import Mask
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import Rng
from data_pipeline.views.dense_views import class_map, random_crop
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options, check_range, pool_of_backbone
from pretrain.ops.cross_entropy import IGNORED
from pretrain.ops.precision import wide


@dataclass
class Config(Options):
    classes: int | None = option(None, low=2)  # K, the number of classes in the masks, which are 0 to K − 1
    void_numbers: list[int] = option(lambda: [255], low=0)  # numbers in masks of pixels without a class
    # whether pixels of the number 0 have no class, and class n has the number n + 1, as in ADE20K
    void_zero: bool = False
    # smallest and largest short side of the scaled image, as a share of model.image_size
    zoom_range: list[float] = option(lambda: [0.5, 2.0], above=0)
    # the feature of a whole image in the export: the class token, or the mean of the patches; auto: what the export of
    # init.backbone says
    pool: Literal["auto", "cls", "mean"] = option("auto", auto=pool_of_backbone)

    def check(self) -> None:
        check_range("zoom_range", self.zoom_range)

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.classes": 3}, {"objective.void_zero": True, "objective.pool": "mean"}]


class FineTuneSegmentation(Objective):
    parts = {"image": Image(), "mask": Mask()}
    target_name = "mask"

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        if cfg.classes is None:
            raise ValueError(
                "objective.classes = null: write objective.classes=NUMBER, that of the classes in the masks"
            )
        self.backbone, self.pool = backbone(local_cls_norm=False), cfg.pool  # there are no local crops
        self.head = nn.Linear(self.backbone.embed_dim, cfg.classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        size, zoom = (about.image_size, about.image_size), (cfg.zoom_range[0], cfg.zoom_range[1])

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            image = sample["image"]
            pixels = image.pixels() if isinstance(image, Encoded) else image  # [H, W, C]
            classes = class_map(sample["mask"], cfg.void_numbers, cfg.void_zero, IGNORED)  # [H, W]
            if classes.shape != pixels.shape[:2]:
                raise Damaged(f"its mask has {classes.shape} pixels, but its image {pixels.shape[:2]}")
            if classes.max() >= int(cfg.classes or 0):
                raise DataError(
                    f"a mask has the class {classes.max()}, but objective.classes = {cfg.classes}, so that classes are 0"
                    f" to {int(cfg.classes or 0) - 1}; write objective.classes=NUMBER, or its number in objective.void_numbers"
                )
            crop, target = random_crop(pixels, classes, size, zoom, IGNORED, rng)
            return {"image": crop, "mask": target.astype(np.int64)}  # [C, S, S], [S, S]

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        target = batch["mask"]  # [B, S, S]
        features = self.backbone(batch["image"])
        maps = wide(self.head(features.tokens)).transpose(1, 2).unflatten(2, features.grid)  # [B, K, h, w]
        logits = F.interpolate(maps, size=target.shape[1:], mode="bilinear", align_corners=False)  # [B, K, S, S]
        total = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
        hits = (logits.argmax(1) == target).sum()
        return self.mean(total, batch), {"pixel_accuracy": self.mean(hits, batch)}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, self.pool, classifier=self.head, dense=True)}
