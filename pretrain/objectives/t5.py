"""T5: an encoder reads a text with spans cut out, a decoder writes the spans (span denoising, arXiv 1910.10683 §3.1.4).

    text:     Thank you for inviting me to your party last week
    encoder:  Thank you <0> me to your party <1> week </s>        15 % of the tokens are cut, in spans of 3 on average
    decoder:  <0> for inviting <1> last </s>                      reads <pad> and the tokens before the one it predicts
    loss = −1/m Σ log p(token),   over the m target tokens of the decoder in the global batch

A row of T tokens is one text, as T5 packs it. T fixes the lengths: S = T − noise + spans + 1 for the encoder,
U = noise + spans + 1 for the decoder. Shapes: B rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.parts.tokens import Tokens
from data_pipeline.views.augmentations import MASKS, Rng
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options
from pretrain.ops.cross_entropy import IGNORED


@dataclass
class Config(Options):
    share: float = option(0.15, above=0, below=1)  # share of the tokens that are cut
    span: float = option(3.0, low=1)  # mean number of tokens in a span

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"model": "t5_micro", "model.mlp_width": 64, "data.document_mask": False}]


class T5(Objective):
    parts = {"tokens": Tokens()}
    validates = True
    target_name = "targets"

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone: Any = backbone()

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        length, vocabulary = about.length, about.vocabulary
        if about.document_mask:
            raise ValueError("data.document_mask = true: t5 treats a row as one text; write data.document_mask=false")
        noise, spans = sizes(cfg, length)
        if len(vocabulary.sentinels) < spans or vocabulary.eos is None or vocabulary.pad is None:
            raise ValueError(
                f"{vocabulary.source}: this vocabulary has {len(vocabulary.sentinels)} sentinels (<extra_id_0>, …),"
                f" end token {vocabulary.eos} and padding token {vocabulary.pad}; rows of {length} tokens need {spans}"
                " sentinels and both tokens: use a tokenizer that has them"
            )
        sentinels, eos, pad = np.array(vocabulary.sentinels), vocabulary.eos, vocabulary.pad

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            tokens = sample["tokens"][:length]
            tokens = tokens[sample["documents"][:length] >= 0]  # padding comes last
            cut = spans_of(cfg, len(tokens), rng(MASKS))
            encoder_text = [*replaced(tokens, cut, sentinels), eos]
            decoder_text = [*replaced(tokens, ~cut, sentinels), eos]
            encoder = np.full(length - noise + spans + 1, pad)
            targets = np.full(noise + spans + 1, IGNORED)
            encoder[: len(encoder_text)], targets[: len(decoder_text)] = encoder_text, decoder_text
            decoder = np.full(len(targets), pad)
            decoder[1 : len(decoder_text)] = decoder_text[:-1]
            documents = np.where(np.arange(len(encoder)) < len(encoder_text), 0, -1)
            return {"tokens": encoder, "documents": documents, "decoder_tokens": decoder, "targets": targets}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.backbone(batch["tokens"], documents=batch["documents"]).tokens  # [B, S, D]
        hidden = self.backbone.decoder(batch["decoder_tokens"], memory, batch["documents"] >= 0)  # [B, U, D]
        return self.mean(self.backbone.head(hidden, batch["targets"]), batch), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}


def sizes(cfg: Config, length: int) -> tuple[int, int]:
    """(number of tokens that are cut, number of spans) in a text of `length` tokens."""
    noise = min(max(round(length * cfg.share), 1), length - 1)
    return noise, max(1, min(round(noise / cfg.span), length - noise))


def spans_of(cfg: Config, length: int, draw: np.random.Generator) -> np.ndarray:
    """bool [length], true for tokens that are cut. The numbers of spans and of cut tokens are fixed, the borders of the
    spans are random; the first token is never cut."""
    if length < 2:
        return np.zeros(length, bool)
    noise, spans = sizes(cfg, length)

    def random_lengths(total: int) -> np.ndarray:
        """Lengths of `spans` parts, each at least 1, whose sum is `total`."""
        ends = np.sort(draw.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff([0, *ends, total])

    lengths = np.stack([random_lengths(length - noise), random_lengths(noise)], 1)  # [spans, 2]: kept, cut
    return np.repeat(np.tile([False, True], spans), lengths.ravel())


def replaced(tokens: np.ndarray, cut: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The tokens, with each span that `cut` (bool, as long as `tokens`) marks replaced by the next sentinel."""
    is_first = cut & ~np.concatenate([[False], cut[:-1]])  # the first token of each span
    out = tokens.copy()
    out[is_first] = sentinels[: is_first.sum()]
    return out[~cut | is_first]
