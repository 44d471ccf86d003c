"""Context encoder: a region of an image is predicted from its surroundings, L2 and adversarial (arXiv 1604.07379).

    x̂ = F((1 − M) ⊙ x): encoder, a fully connected layer in each channel, decoder; the dropped region M becomes 0
    L_rec = mean over the region's pixels of w (x̂ − x)²,  w = 10 in the border of a centre, else 1      (eq. 1, §4.1)
    L_adv = max_D E[log D(x) + log(1 − D(x̂))], where D sees the region only                                    (eq. 2)
    L = λ_rec L_rec + λ_adv L_adv                                                                               (eq. 3)

The border of the dropped centre is predicted although the encoder sees it. As in the published code, which has no
border around random regions, the sum is divided by the number of pixels, not by that of the weights.

One backward trains both networks. Its gradients are those of λ_rec L_rec + L_D, L_D = −E[log D(x) + log(1 − D(x̂))],
where the gradient of x̂ in L_D is multiplied by −λ_adv: the discriminator descends L_D, while encoder and decoder descend
λ_rec L_rec − λ_adv L_D, which is eq. 3 and the value that is returned. The paper alternates instead: an update of D,
then one of F against the new D. Here both are updated at the same time from the weights before the step, by one
optimizer with one clipping and one schedule; the learning rate of D is a tenth of that of F, as published. The published
code lets F maximise log D(x̂) in place of minimising log(1 − D(x̂)); both have the same fixed point, but the gradient of
eq. 2 is smaller while D wins. With λ_adv = 0, as for the paper's features, there is no D.

The decoder predicts the whole image, and losses use the region: the centre, or a random region of the same area. Its
last layer is linear. D averages its last map, so that it takes any image size.

Shapes: B images, C channels, S pixels per side, D encoder width, N = h·w patches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import option, option_if
from data_pipeline.parts.part import About
from data_pipeline.views.augmentations import MASKS, Augment, Rng, crops
from data_pipeline.views.masks import central_region, grown, random_region
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.image_rows import side_by_side
from pretrain.ops.precision import wide
from pretrain.ops.reverse_gradient import reverse_gradient
from pretrain.ops.sync_norm import BatchNorm
from pretrain.ops.upsampling import doublings, upsampling

DROPPED, BORDER = 1, 2  # values of `region`; 0: context


@dataclass
class Config(Options):
    # which region is dropped; the paper trains features with random ones
    dropped_region: Literal["center", "random"] = "random"
    # side of the predicted central square as a share of the image's side, border included
    center_share: float = option_if(0.5, "dropped_region", "center", above=0, below=1)
    # area of the dropped region, relative to the image's
    random_share: float = option_if(0.25, "dropped_region", "random", above=0, below=1)
    border: int = option_if(7, "dropped_region", "center", low=0)  # width of the predicted border that is not dropped
    border_weight: float = option_if(10.0, "dropped_region", "center", low=0)  # weight of a pixel in this border
    reconstruction_weight: float = option(0.999, low=0)  # λ_rec
    adversarial_weight: float = option(0.001, low=0)  # λ_adv; 0: there is no discriminator
    decoder_dim: int = option(512, low=1)  # width of the decoder's first map, halved in each further layer
    # width of the discriminator's first map, doubled in each further layer, up to 8 times
    discriminator_dim: int = option_if(64, "adversarial_weight", unless=0.0, low=1)
    crop_scale: float = option(0.2, above=0, high=1)  # smallest share of the image's area in a random crop

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        sizes = {"objective.decoder_dim": 32, "objective.discriminator_dim": 8}
        return [
            {**sizes, "objective.dropped_region": "random"},
            {"objective.dropped_region": "center", "objective.border": 2},
        ]


class ChannelwiseLinear(nn.Module):
    """A fully connected layer within each channel (§3.1): [B, D, N] → [B, D, N]."""

    def __init__(self, channels: int, places: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, places, places) * places**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bdn,dnm->bdm", x, self.weight.to(x.dtype))


class ContextEncoder(Objective):
    lr_scales = {"discriminator": 0.1}

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone = backbone(local_cls_norm=False)  # there are no local crops
        size, patch, width = self.backbone.image_size, self.backbone.patch_size, self.backbone.embed_dim
        channels: int = self.backbone.cfg.in_channels  # type: ignore[union-attr, assignment]
        steps = doublings(patch, "model.patch_size")
        self.mix = ChannelwiseLinear(width, (size // patch) ** 2)
        self.decoder = nn.Sequential(
            nn.Conv2d(width, cfg.decoder_dim, 1, bias=False),  # across channels
            BatchNorm(cfg.decoder_dim),
            nn.ReLU(),
            upsampling([max(1, cfg.decoder_dim >> n) for n in range(steps)] + [channels], norm=True),
        )
        if cfg.adversarial_weight:
            self.discriminator = discriminator(channels, size, cfg.discriminator_dim)

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        size = about.image_size
        augment = Augment(size, scale=(cfg.crop_scale, 1.0))
        center = None  # uint8 [S, S], if it is what is dropped
        if cfg.dropped_region == "center":
            side = round(cfg.center_share * size) - 2 * cfg.border
            if side < 1:
                raise ValueError(
                    f"objective.border = {cfg.border}: leaves nothing of the dropped centre; write a lower one"
                )
            dropped = central_region(size, side)
            center = np.where(dropped, DROPPED, np.where(grown(dropped, cfg.border), BORDER, 0)).astype(np.uint8)
        elif not int(cfg.random_share * size**2):
            raise ValueError(
                f"objective.random_share = {cfg.random_share}: drops no pixel of {size}×{size}; write a higher one"
            )

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            region = center
            if region is None:
                region = np.where(random_region(size, cfg.random_share, rng(MASKS)), DROPPED, 0).astype(np.uint8)
            return crops(sample, {"image": augment}, rng) | {"region": region}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, region, cfg = batch["image"], batch["region"].unsqueeze(1), self.cfg  # [B, C, S, S], [B, 1, S, S]
        predicted = self.predict(images, region)
        inside = (region > 0).to(images.dtype)
        weight = torch.where(region == BORDER, cfg.border_weight, inside) if cfg.dropped_region == "center" else inside
        error = (weight * (predicted - images).square()).sum((1, 2, 3)) / (inside.sum((1, 2, 3)) * images.shape[1])
        reconstruction = error.mean()
        logs, loss = {"reconstruction": reconstruction.detach()}, cfg.reconstruction_weight * reconstruction
        if not cfg.adversarial_weight:
            return loss, logs
        real = wide(self.discriminator(inside * images))  # [B, 1], logits of D
        fake = wide(self.discriminator(reverse_gradient(inside * predicted, cfg.adversarial_weight)))
        discrimination = F.softplus(-real).mean() + F.softplus(fake).mean()  # −log D(x) − log(1 − D(x̂))
        logs["discriminator"] = discrimination.detach()
        # the gradient of the discriminator's loss, but the value of eq. 3
        return loss + discrimination - (1 + cfg.adversarial_weight) * discrimination.detach(), logs

    def predict(self, images: Tensor, region: Tensor) -> Tensor:
        """x̂ [B, C, S, S]."""
        features = self.backbone(images.masked_fill(region == DROPPED, 0.0))
        mixed = self.mix(features.tokens.transpose(1, 2))  # [B, D, N]
        return wide(self.decoder(mixed.unflatten(2, features.grid)))

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}  # no loss trains the class token directly

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """uint8 [3, B·H, 3·W]: images, what the encoder sees, and the images with the predicted region."""
        images, region = batch["image"][:6], batch["region"][:6].unsqueeze(1)
        painted = torch.where(region == DROPPED, self.predict(images, region).to(images.dtype), images)
        return {"predictions": side_by_side([images, images.masked_fill(region == DROPPED, 0.0), painted])}


def discriminator(channels: int, size: int, width: int) -> nn.Sequential:
    """D: [B, C, S, S] → logits [B, 1]. 4×4 convolutions of stride 2 down to a map of about 4×4, as in DCGAN (arXiv
    1511.06434), and a linear layer on the mean of this map."""
    steps = max(1, (size // 4).bit_length() - 1)
    widths = [channels, *(width * min(2**n, 8) for n in range(steps))]
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=not number))
        layers += [BatchNorm(outputs)] if number else []  # not after the first one
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1))
