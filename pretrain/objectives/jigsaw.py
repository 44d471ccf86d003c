"""Jigsaw: a network recognises in which order the tiles of an image were shuffled (arXiv 1603.09246).

    3 × 3 cells, one tile at a random place in each; tiles in the order of permutation S_p, p uniform in 1 … P
    context-free network: h(x) = W_2 relu(W_1 [r(x_1), …, r(x_9)] + b_1) + b_2,  r(x_i) = relu(W_0 f(x_i) + b_0)
    loss = −log softmax(h(x))_p, mean over images                                                      (eq. 3, §4)

The encoder f and the layer r (fc6 of the paper) see one tile at a time; only the layers above them (fc7, fc8) compare
tiles. The set of permutations is chosen by maximal Hamming distance (algorithm 1). Against shortcuts (§4.2) tiles have
gaps, each channel of each tile gets mean 0 and standard deviation 1, each channel is moved by a random number of
pixels, and a share of the images is grey; all channels of a grey tile are moved together. There is no dropout.

Shapes: B images, T = 9 tiles each, D encoder width, F features of a tile, P permutations, t pixels of a tile's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.colors import grayscale
from data_pipeline.views.tiles import permutation_set, tiles
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.cross_entropy import classification
from pretrain.ops.precision import wide

SIDE = 3  # tiles along a side
TILES = SIDE * SIDE


@dataclass
class Config(Options):
    permutations: int = option(1000, low=2, high=362880)  # P, the number of orders that are told apart
    tile_size: int = option(64, low=1)  # t, side of a tile in pixels
    cell_size: int = option(75, low=1)  # side of a cell in pixels; the gap between tiles is on average the difference
    tile_features: int = option(512, low=1)  # F, width of the layer that sees one tile
    head_hidden: int = option(4096, low=1)  # width of the hidden layer that sees all tiles
    # smallest share of the image's area in a random crop; the paper crops 225 pixels of an image whose short side has 256
    crop_scale: float = option(0.77, above=0, high=1)
    gray_share: float = option(0.3, low=0, high=1)  # share of the images that are grey
    channel_shift: int = option(2, low=0)  # largest number of pixels by which a channel of a tile is moved

    def check(self) -> None:
        if self.tile_size > self.cell_size:
            raise ValueError(
                f"objective.tile_size = {self.tile_size}: must be at most objective.cell_size = {self.cell_size}"
            )

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"permutations": 20, "tile_size": 16, "cell_size": 20, "tile_features": 16, "head_hidden": 32}
        return [{f"objective.{name}": value for name, value in sizes.items()}]


class Jigsaw(Objective):
    part_of = {"tiles": "image"}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        patch = self.backbone.patch_size
        if self.backbone.whole_patches and cfg.tile_size % patch:
            raise ValueError(f"objective.tile_size = {cfg.tile_size} pixels does not divide into patches of {patch}")
        self.tile_head = nn.Sequential(nn.Linear(self.backbone.embed_dim, cfg.tile_features), nn.ReLU())
        self.head = nn.Sequential(
            nn.Linear(TILES * cfg.tile_features, cfg.head_hidden),
            nn.ReLU(),
            nn.Linear(cfg.head_hidden, cfg.permutations),
        )

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        size = SIDE * cfg.cell_size + 2 * cfg.channel_shift
        augment = Augment(size, scale=(cfg.crop_scale, 1.0), flip=0.0)
        orders = permutation_set(cfg.permutations, TILES)

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            image = crops(sample, {"image": augment}, rng)["image"]
            channels, draw = len(image), rng(MASKS)
            number, gray = draw.integers(len(orders)), draw.random() < cfg.gray_share
            if gray and channels == 3:
                image = grayscale(np.ascontiguousarray(image.transpose(1, 2, 0)))[None]  # one channel
            cut = tiles(image, SIDE, cfg.tile_size, cfg.channel_shift, draw)[orders[number]]
            cut = np.repeat(cut, channels // cut.shape[1], axis=1)  # [T, C, t, t]
            return {"tiles": cut, "permutation": np.asarray(number)}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(standardised(batch["tiles"]).flatten(0, 1)).cls  # [B·T, D]
        each = self.tile_head(features).unflatten(0, (-1, TILES))  # [B, T, F]
        logits = wide(self.head(each.flatten(1)))  # [B, P]
        target = batch["permutation"]  # [B]
        return classification(logits, target)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}


def standardised(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Every channel of every tile [..., C, t, t] with mean 0 and variance 1; one of a single colour becomes 0."""
    x = x - x.mean((-2, -1), keepdim=True)
    return x / (x.square().mean((-2, -1), keepdim=True) + eps).sqrt()
