"""What a dual encoder has beside its image model: the text model, the projections of both into one space, and the scale
and bias of similarities. An objective puts its sub-modules into a `TextSide` to export them; evaluation reads it back.

Shapes: N texts of T tokens, B images, D width of a model, E width of the embeddings.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.models.build import build_model
from pretrain.models.layers import Backbone
from pretrain.models.text_layers import TextBackbone
from pretrain.ops.patchify import pick
from pretrain.ops.precision import unit

Kind = Literal["clip", "siglip"]
PREFIX = "text_side."  # of its tensors among those of an export


def at_eos(text: Backbone, tokens: Tensor, last: Tensor) -> Tensor:
    """The features [N, D] of a text model at the places `last`, long [N], of EOS in tokens long [N, T]. The padding
    behind EOS is not seen, also by a bidirectional model."""
    documents = None
    if not cast(TextBackbone, text).causal:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        documents = torch.where(places <= last.unsqueeze(1), 0, -1)  # [N, T]
    return pick(text(tokens, documents=documents).tokens, last.unsqueeze(1)).squeeze(1)


class TextSide(nn.Module):
    """`kind`: clip takes a text's feature from the place of EOS, and projects images, too; siglip takes it from the last
    place, and has a bias. `captions`: the part that has the length of a text and its vocabulary."""

    logit_bias: Tensor | None

    def __init__(
        self,
        kind: Kind,
        text: Backbone,
        text_projection: nn.Linear,
        image_projection: nn.Linear | None,
        logit_scale: nn.Parameter,
        logit_bias: nn.Parameter | None,
        captions: Any,
    ):
        super().__init__()
        self.kind: Kind = kind
        self.captions = captions
        self.text, self.text_projection, self.image_projection = text, text_projection, image_projection
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias

    def forward(self, tokens: Tensor, last: Tensor) -> Tensor:
        """Embeddings [N, E] of length 1, of tokens long [N, T] whose EOS is at the places `last`, long [N]."""
        feature = at_eos(self.text, tokens, last) if self.kind == "clip" else self.text(tokens).tokens[:, -1]
        return unit(self.text_projection(feature))

    def embed_images(self, features: Tensor) -> Tensor:
        """Embeddings [B, E] of length 1, of the image model's features [B, D]."""
        return unit(features if self.image_projection is None else self.image_projection(features))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """[B, N] of embeddings."""
        products = self.logit_scale.exp() * (images @ texts.T)
        return products if self.logit_bias is None else products + self.logit_bias


def build_text_side(kind: Kind, model: Any, image_dim: int, projection_dim: int, captions: Any) -> TextSide:
    """A text side with the text model that the options `model` describe; its weights are to be loaded."""
    text, scale = build_model(model), torch.zeros(1)
    clip = kind == "clip"
    return TextSide(
        kind,
        text,
        nn.Linear(text.embed_dim, projection_dim, bias=not clip),
        nn.Linear(image_dim, projection_dim, bias=False) if clip else None,
        nn.Parameter(scale.clone()),
        None if clip else nn.Parameter(scale.clone()),
        captions,
    )
