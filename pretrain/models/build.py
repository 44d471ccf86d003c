"""Build the network of a model's config. The configs are in `families.py`, which does not import torch."""

from __future__ import annotations

import importlib
from typing import Any

from common.config import config_class, fields
from common.errors import ConfigError
from pretrain.models import families
from pretrain.models.layers import Backbone

NETWORKS = {
    families.ViT: "vit.VisionTransformer",
    families.SpectrogramViT: "vit.VisionTransformer",
    families.VideoViT: "video_vit.VideoTransformer",
    families.ConvNeXt: "convnext.ConvolutionalNetwork",
    families.ResNet: "resnet.ResidualNetwork",
    families.Timm: "timm_network.TimmNetwork",
    families.Decoder: "text_models.DecoderTransformer",
    families.TextEncoder: "text_models.EncoderTransformer",
    families.Conformer: "conformer.ConformerNetwork",
    families.EncoderDecoder: "t5.EncoderDecoderTransformer",
}


def build_model(cfg: Any, **changes: Any) -> Backbone:
    """The backbone that `cfg` (a ViT, ConvNeXt, Decoder, …) describes, with some options changed, randomly initialised
    from torch's global generator. An option that is changed to False may be one that the model does not have."""
    changes = {key: value for key, value in changes.items() if value is not False or key in fields(type(cfg))}
    for key in changes:
        if key not in fields(type(cfg)):
            family = config_class(cfg).__name__
            raise ConfigError(
                f"model.name = {cfg.name!r}: the objective sets model.{key}, which a {family} does not have;"
                " choose a ViT (model=vit_small)"
            )
    file, name = NETWORKS[config_class(cfg)].split(".")
    network = getattr(importlib.import_module(f"pretrain.models.{file}"), name)(cfg.replace(**changes))
    network.cfg = network.cfg.settled()
    return network
