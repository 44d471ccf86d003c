"""BEiT: a ViT predicts the visual tokens of masked patches, which a frozen tokenizer has made (arXiv 2106.08254).

    z = tokenizer(image): one of K visual tokens for each of N patches                                        (§2.1)
    M: at least 16 patches in each of several blocks, up to 40 % of the N patches in all         (§2.3, algorithm 1)
    loss = −1/|M| Σ_{i ∈ M} log softmax(W h_i + b)_{z_i},  h = encoder(image with mask tokens at M)         (eqs. 1, 2)

The tokenizer is an export of the objective `vqvae`: an encoder and a codebook. It sees the same crop as the ViT, at the
size at which it has one token for each patch: with patches of 16 pixels, a tokenizer of 8 pixels per token sees half of
the size, as in the paper. The paper's tokenizer is that of DALL-E, with 8,192 tokens. Every image has exactly the same
number of masked patches: if ten blocks in a row do not fit, single patches are masked, where BEiT's code stops.

Shapes: B images, N patches, M masked ones of each image, D encoder width, K visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.masks import block_mask
from pretrain.interchange import teachers
from pretrain.interchange.weight_sources import further_tensors
from pretrain.interchange.weights import load_into
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import MaskedBlocks
from pretrain.ops.codebook import nearest
from pretrain.ops.cross_entropy import classification
from pretrain.ops.init import trunc_normal
from pretrain.ops.patchify import mask_at, pick
from pretrain.ops.precision import wide


@dataclass
class Config(MaskedBlocks):
    visual_tokenizer: str = ""  # an export of a run of vqvae: RUN/export/STEP

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"objective.visual_tokenizer": "{run vqvae}/export/2", "objective.smallest_block": 2}]


class BEiT(Objective):
    part_of = {"visual": "image"}
    kept_in_eval = ("tokenizer",)
    codebook: Tensor

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(mask_token=True, local_cls_norm=False)
        codebook = codebook_of(cfg.visual_tokenizer)
        self.tokenizer = teachers.build_like(cfg.visual_tokenizer)
        teachers.check_reads(f"objective.visual_tokenizer = {cfg.visual_tokenizer}", self.tokenizer, self.backbone)
        load_into(self.tokenizer, cfg.visual_tokenizer)
        self.tokenizer.requires_grad_(False).eval()
        # [K, width of the tokenizer]; a new tensor, which is on the meta device while the objective is built without memory
        self.register_buffer("codebook", torch.empty(codebook.shape, dtype=codebook.dtype).copy_(codebook))
        self.head = nn.Linear(self.backbone.embed_dim, len(codebook))
        trunc_normal(self.head)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        side = about.image_size // about.patch_size
        count = cfg.masked_patches(side)  # M
        scale, jitter = (cfg.crop_scale, 1.0), tuple(cfg.jitter)
        sizes = {"image": about.image_size, "visual": side * teachers.patch_size_of(cfg.visual_tokenizer)}
        augments = {name: Augment(size, scale, jitter=jitter, jitter_p=1.0) for name, size in sizes.items()}

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            mask = block_mask((side, side), count, rng(MASKS), cfg.smallest_block)
            return crops(sample, augments, rng, {"visual": "image"}) | {"masked": np.flatnonzero(mask)}  # [M]

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        masked = batch["masked"]  # [B, M]
        with torch.no_grad():
            z = nearest(self.tokenizer(batch["visual"]).tokens, self.codebook)  # [B, N]
        tokens = self.backbone(batch["image"], mask=mask_at(masked, z.shape[1])).tokens  # [B, N, D]
        h = pick(tokens, masked)  # [B, M, D]
        logits = wide(self.head(h.flatten(0, 1)))  # [B·M, K]
        target = z.gather(1, masked).flatten()  # [B·M]
        return classification(logits, target)

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}  # no loss trains the class token directly


def codebook_of(where: str) -> Tensor:
    """The codebook [K, D] in an export of vqvae. Raises UserError if there is none."""
    advice = "write an export of a run of vqvae, RUN/export/STEP"
    if not where:
        raise ValueError(f"objective.visual_tokenizer is empty; {advice}")
    try:
        found = further_tensors(where)
    except UserError as error:
        raise UserError(f"objective.visual_tokenizer: {error}; {advice}") from None
    if "codebook" not in found:
        raise UserError(f"objective.visual_tokenizer = {where}: holds no codebook; {advice}")
    return found["codebook"]
