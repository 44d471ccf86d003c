"""MAE with the modules of lightly: its decoder, its masks and its targets (arXiv 2111.06377)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM
from torch import Tensor, nn

from pretrain.objectives.base import Batch, Builder, Exported, Objective
from pretrain.objectives.mae import MAE, Config


class LightlyMAE(Objective):
    views = staticmethod(MAE.views)

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)
        patch = self.backbone.patch_size
        patches = (self.backbone.image_size // patch) ** 2
        self.embed = nn.Linear(self.backbone.embed_dim, cfg.decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            patches, cfg.decoder_dim, cfg.decoder_depth, cfg.decoder_heads
        )
        self.predict = nn.Linear(cfg.decoder_dim, patch**2 * 3)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["image"]
        features = self.backbone(images, keep=batch["keep"])
        encoded = self.embed(torch.cat([features.cls.unsqueeze(1), features.tokens], dim=1))
        keep = F.pad(batch["keep"] + 1, (1, 0))  # the class token is token 0
        size = (len(images), self.decoder.sequence_length)
        # the tokens that are not kept, in order; lightly's `random_token_mask` sorts random numbers, too
        masked = torch.ones(size, dtype=torch.uint8, device=images.device).scatter(1, keep, 0)
        masked = masked.argsort(dim=1, descending=True, stable=True)[:, : size[1] - keep.shape[1]]
        x = utils.repeat_token(self.decoder.mask_token, size)
        x = self.decoder(utils.set_at_index(x, keep, encoded.type_as(x)))
        predicted = self.predict(utils.get_at_index(x, masked))
        target = utils.get_at_index(utils.patchify(images, self.backbone.patch_size), masked - 1)
        return F.mse_loss(predicted, utils.normalize_mean_var(target) if self.cfg.norm_pix else target), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}
