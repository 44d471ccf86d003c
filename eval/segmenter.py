"""Semantic segmentation by the head that an export holds, such as that of a run of `finetune_segmentation`.

Nothing is fitted, so there is no gallery. Images, windows and scores are those of `segmentation.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from common.errors import UserError
from data_pipeline.formats.pixel_maps import MASKS
from eval.dense_data import Pairs
from eval.features import Encoder
from eval.segmentation import Scored, score, window_size
from pretrain.interchange.weight_sources import segmenter_of

NEEDS = "query_masks"
UNIT = "images"
VERSION = 1


@dataclass
class Config(Scored):
    """Which pixels are scored, and how an image is covered by windows."""


def check_shards(shards: list[str], role: str, cfg: Config) -> None:
    """Raises DataError if no sample holds both an image and a mask."""
    Pairs(None, shards, cfg.member, MASKS, "segmenter.member")


def run(encoder: Encoder, gallery: list[str], query: list[str], cfg: Config) -> dict[str, float]:
    """{"miou", "pixel_accuracy", "classes", "size"}, and the numbers of images."""
    if encoder.folder is None:
        raise UserError(f"{encoder.name}: has no segmentation head; name an export of a run of `finetune_segmentation`")
    found = segmenter_of(encoder.folder)
    head = nn.Conv2d(found.weight.shape[1], len(found.weight), 1).requires_grad_(False)
    head.weight.copy_(found.weight[:, :, None, None])
    assert head.bias is not None
    head.bias.copy_(found.bias)
    pairs = Pairs(encoder, query, cfg.member, MASKS, "segmenter.member")
    scored = score(
        encoder, head.to(encoder.device), pairs, len(found.weight), window_size(encoder, cfg, "segmenter"), cfg, 1
    )
    return {**scored, "left_out": len(pairs.damaged), "passed_over": pairs.passed_over}
