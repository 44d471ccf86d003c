"""SigLIP: whether an image and a caption belong together, decided for each pair of the batch (arXiv 2303.15343).

    x = f(image) / ‖·‖;   y = (W g(caption) + c) / ‖·‖
    loss = −1/B Σᵢⱼ log sigmoid(zᵢⱼ (t xᵢ yⱼᵀ + b)),   zᵢⱼ = 1 for i = j, else −1;  t = exp(logit_scale), b learned

The published b starts at −10, for batches of 32,768; here it starts at −ln B in smaller ones (`initial_bias`).

f is the recipe's model; as published, a ViT with an attention pool in place of the class token (`model.pooling`). g is
a bidirectional transformer over all T places, padding included, whose feature is that of the last place. Other than a
softmax, the loss needs no sum over the batch: each rank compares its images with the captions of one rank at a time.
`patch_drop` and `locked` are those of FLIP (2212.00794) and LiT (2111.07991).

Shapes: B images, each with a caption of T tokens, D width of the embeddings and of the image model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.parts.caption import Caption, CaptionTokens
from data_pipeline.parts.image import Image
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import Augment
from data_pipeline.views.image_text import ImageText
from pretrain.models.text_side import TextSide
from pretrain.objectives.base import Batch, Builder, Exported, Objective, View
from pretrain.objectives.options import SigmoidPairs
from pretrain.ops.contrastive import sigmoid_pairs
from pretrain.ops.init import xavier
from pretrain.ops.precision import unit


@dataclass
class Config(SigmoidPairs):
    """The options of SigLIP."""


class SigLIP(Objective):
    couples_batch = True
    parts = {"image": Image(), "text": Caption(length=64)}

    def __init__(self, cfg: SigmoidPairs, backbone: Builder, **changes: Any) -> None:
        """`changes`: options of the image model that differ from the recipe."""
        super().__init__(cfg, backbone)
        self.image, self.text = backbone(local_cls_norm=False, **changes), backbone("text")
        self.text_projection = nn.Linear(self.text.embed_dim, self.image.embed_dim)
        for part in (self.text_projection, *(tower for tower in (self.image, self.text) if not tower.loaded)):
            xavier(part)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(cfg.initial_scale)))
        self.logit_bias = nn.Parameter(torch.full((1,), float(cfg.initial_bias)))
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
        text = self.text(batch["tokens"]).tokens[:, -1]  # [B, width of the text model]
        scale, bias = self.logit_scale.exp(), self.logit_bias
        loss = sigmoid_pairs(unit(image), unit(self.text_projection(text)), scale, bias)
        return loss, {"scale": scale.detach().squeeze(0), "bias": bias.detach().squeeze(0)}

    def exports(self) -> dict[str, Exported]:
        learned = (self.logit_scale, self.logit_bias)
        side = TextSide("siglip", self.text, self.text_projection, None, *learned, self.parts["text"])
        return {"model": Exported(self.image, text_side=side)}
