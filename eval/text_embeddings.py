"""Embeddings of images and texts from an exported dual encoder, for zero-shot classification and retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from data_pipeline.parts.caption import CaptionTokens
from data_pipeline.parts.part import About
from pretrain.interchange import text_sides
from pretrain.models.text_side import TextSide

BATCH = 256  # texts that are embedded at once


def text_side_of(encoder: Any) -> TextSide:
    """The text side in the folder of an encoder, on its device. Raises UserError if there is none."""
    if getattr(encoder, "folder", None) is None or not text_sides.has_one(encoder.folder):
        raise UserError(f"{encoder.name}: holds no text model beside its image model; name an export of clip or siglip")
    return text_sides.load(encoder.folder).to(encoder.device)


@torch.inference_mode()
def embed_texts(side: TextSide, texts: Sequence[str]) -> Tensor:
    """fp32 [N, E] on the CPU, rows of length 1."""
    tokens = CaptionTokens(About(**side.captions.about([], None)), side.text.cfg, "text")
    device, rng, out = side.logit_scale.device, np.random.default_rng(0), []
    for first in range(0, len(texts), BATCH):
        rows = [tokens(text, rng) for text in texts[first : first + BATCH]]
        ids, last = (torch.from_numpy(np.stack([row[key] for row in rows])).to(device) for key in ("tokens", "last"))
        out.append(side(ids, last).float().cpu())
    return torch.cat(out)


@torch.inference_mode()
def embed_features(side: TextSide, features: Tensor) -> Tensor:
    """fp32 [B, E] on the CPU, rows of length 1, of the image model's features [B, D]."""
    return side.embed_images(features.to(side.logit_scale.device)).float().cpu()
