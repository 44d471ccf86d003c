"""CLIP: images and their captions find each other among all pairs of the batch (arXiv 2103.00020).

    x = W_x f(image) / ‖·‖;   y = W_y g(caption) / ‖·‖
    loss = (CE(s·x yᵀ) + CE(s·y xᵀ)) / 2,   s = exp(logit_scale) ≤ 100, learned; targets: the partners

f is the recipe's model, g a causal transformer whose feature is that of EOS. With `patch_drop`, f sees a random subset
of the patches (FLIP, 2212.00794). With `locked`, f keeps the weights of `init.backbone` (LiT, 2111.07991).

Shapes: B images, each with a caption of T tokens, D width of a tower, E width of the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import Section, option
from data_pipeline.parts.caption import Caption, CaptionTokens
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import Augment
from data_pipeline.views.image_text import ImageText
from pretrain.models.text_side import TextSide, at_eos
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import ImageTextPairs, network
from pretrain.ops.contrastive import softmax_pairs
from pretrain.ops.init import by_width
from pretrain.ops.parameter_shards import local
from pretrain.ops.precision import unit

MAX_LOG_SCALE = math.log(100)  # §2.5


@dataclass
class Config(ImageTextPairs):
    text: Section = network("clip_text")  # the model that reads captions
    projection_width: int = option(512, low=1)  # width of the embeddings that are compared
    temperature: float = option(0.07, above=0)  # 1 / s at the beginning

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        text = {"name": "clip_text", "dim": 32, "depth": 2, "heads": 2, "vocab_size": 512, "context": 24}
        first = {"data.length": 24, "objective.text": text, "objective.projection_width": 16}
        return [first, {"objective.patch_drop": 0.5}]


class CLIP(Objective):
    couples_batch = True
    least_batch = 2  # a single pair has no negatives: its loss is 0
    parts = {"image": Image(), "text": Caption(length=77)}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.image, self.text = backbone(local_cls_norm=False), backbone("text")
        self.image_projection = nn.Linear(self.image.embed_dim, cfg.projection_width, bias=False)
        self.text_projection = nn.Linear(self.text.embed_dim, cfg.projection_width, bias=False)
        for tower, projection in ((self.image, self.image_projection), (self.text, self.text_projection)):
            if not tower.loaded:
                by_width(tower, tower.embed_dim)
            nn.init.normal_(projection.weight, std=tower.embed_dim**-0.5)
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(cfg.temperature)))
        if cfg.locked:
            self.image.requires_grad_(False)
            self.kept_in_eval = ("image",)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        tokens = CaptionTokens(about, cfg.text, "objective.text")
        augment = Augment(about.image_size, scale=(cfg.crop_scale, 1.0), flip=cfg.flip)
        return ImageText(augment, about.patch_size, tokens, cfg.patch_drop)

    def before_first_step(self, loaded: set[str]) -> None:
        if self.cfg.locked and not (self.image.loaded or any(name.startswith("image.") for name in loaded)):
            raise ValueError("objective.locked = true: the image model has random weights; write init.backbone=FOLDER")

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.image(batch["image"], keep=batch.get("keep")).cls  # [B, D]
        text = at_eos(self.text, batch["tokens"], batch["last"])  # [B, D]
        scale = self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
        loss = softmax_pairs(unit(self.image_projection(image)), unit(self.text_projection(text)), scale)
        return loss, {"scale": scale.detach().squeeze(0)}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        # ZeRO's optimizer keeps a copy of its own, which is not clamped; `forward` clamps in every mode
        local(self.logit_scale).clamp_(max=MAX_LOG_SCALE)

    def exports(self) -> dict[str, Exported]:
        projections = (self.text_projection, self.image_projection)
        side = TextSide("clip", self.text, *projections, self.logit_scale, None, self.parts["text"])
        return {"model": Exported(self.image, text_side=side)}
