"""Exported encoders as backbones of eva, kaiko's framework for scores on pathology images (MIDL 2024). In a config of eva,
a backbone is written as

    class_path: eva.models.ModelFromFunction
    init_args:
      path: eval.eva_model.backbone
      arguments: {model: runs/mine/export/20000}

The features of eva's tasks are then pooled as for the protocols here. Its segmentation reads maps of patches, which
`arguments: {model: …, output: patches}` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.errors import UserError
from eval.features import open_encoder

HALF = (0.5, 0.5, 0.5)  # the default of eva's `ResizeAndCrop`


def backbone(
    model: str,
    output: Literal["pooled", "patches"] = "pooled",
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> nn.Module:
    """The encoder of an exported folder, or "pixels", as a module of images [B, 3, H, W] that eva's transform has
    normalised by `mean` and `std`. They get the normalisation that the export was trained with instead."""
    encoder, _ = open_encoder(model, device="cpu")  # eva moves it to the device of its trainer
    if encoder.unit != "images":
        raise UserError(f"{model}: reads {encoder.unit}, but eva's tasks give images; name an export that reads them")
    if not encoder.channels == len(mean) == len(std):
        raise UserError(
            f"{model}: reads {encoder.channels} channels, but mean and std are of {len(mean)} and {len(std)}; write as"
            " many numbers as the images have channels"
        )
    if output not in ("pooled", "patches"):
        raise UserError(f"output = {output}: write pooled or patches")
    return _Backbone(encoder, output, mean, std)


class _Backbone(nn.Module):
    factor: Tensor
    offset: Tensor

    def __init__(self, encoder: Any, output: str, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.pool, self.output = encoder.backbone, encoder.pool, output
        own_mean, own_std, given_mean, given_std = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            for values in (encoder.mean, encoder.std, mean, std)
        )
        self.register_buffer("factor", given_std / own_std, persistent=False)  # [3, 1, 1]
        self.register_buffer("offset", (given_mean - own_mean) / own_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """[B, 3, H, W] → features [B, D], or a list of one map of patches [B, D, h, w]."""
        features = self.network(images * self.factor + self.offset)
        if self.output == "patches":
            return [features.tokens.transpose(1, 2).unflatten(2, features.grid)]
        return features.cls if self.pool == "cls" else features.tokens.mean(1)
