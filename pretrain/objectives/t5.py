"""T5: an encoder reads a text with spans cut out, a decoder writes what was cut (span denoising, arXiv 1910.10683 §3.1.4).

    text:     Thank you for inviting me to your party last week
    encoder:  Thank you <0> me to your party <1> week </s>        15 % of the tokens are cut, in spans of 3 on average
    decoder:  <0> for inviting <1> last </s>                      reads what it has written so far, behind <pad>
    loss = −1/m Σ log p(token),   over the m tokens of the global batch that decoders write

A row of T tokens is one text, as T5 packs it. Lengths are fixed by T: S = T − noise + spans + 1 for the encoder, U = noise + spans + 1 for the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.views import MASKS
from pretrain.config import Section
from pretrain.objectives.base import Objective
from pretrain.ops.cross_entropy import IGNORED


@dataclass
class Config(Section):
    share: float = 0.15  # of the tokens that are cut
    span: float = 3.0  # their mean number in a span


class T5(Objective):
    reads = "text"
    pool = "mean"
    counted = "targets"

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        if not 0 < cfg.share < 1 or cfg.span < 1:
            raise ValueError(
                f"objective.share = {cfg.share}, objective.span = {cfg.span}: a share between 0 and 1, spans of 1 or more"
            )
        self.backbone = backbone()

    @staticmethod
    def views(cfg, length, vocabulary, document_mask):
        if document_mask:
            raise ValueError("data.document_mask = true: t5 takes a row for one text; write data.document_mask=false")
        noise, spans = sizes(cfg, length)
        if len(vocabulary.sentinels) < spans or vocabulary.eos is None or vocabulary.pad is None:
            raise ValueError(
                f"{vocabulary.source}: has {len(vocabulary.sentinels)} sentinels (<extra_id_0>, …), end {vocabulary.eos} and padding {vocabulary.pad};"
                f" rows of {length} tokens need {spans} sentinels and both: tokenize with one that has them"
            )
        sentinels, eos, pad = np.array(vocabulary.sentinels), vocabulary.eos, vocabulary.pad

        def view(sample, rng):
            tokens = sample["tokens"][:length]
            tokens = tokens[sample["documents"][:length] >= 0]  # padding comes last
            cut = spans_of(cfg, len(tokens), rng(MASKS))
            read = [*replaced(tokens, cut, sentinels), eos]
            written = [*replaced(tokens, ~cut, sentinels), eos]
            encoder = np.full(length - noise + spans + 1, pad)
            targets = np.full(noise + spans + 1, IGNORED)
            encoder[: len(read)], targets[: len(written)] = read, written
            decoder = np.full(len(targets), pad)
            decoder[1 : len(written)] = written[:-1]
            documents = np.where(np.arange(len(encoder)) < len(read), 0, -1)
            return {"tokens": encoder, "documents": documents, "decoder_tokens": decoder, "targets": targets}

        return view

    def forward(self, batch, step):
        memory = self.backbone(batch["tokens"], documents=batch["documents"]).tokens  # [B, S, D]
        hidden = self.backbone.decoder(batch["decoder_tokens"], memory, batch["documents"] >= 0)  # [B, U, D]
        return self.mean(self.backbone.head(hidden, batch["targets"]), batch), {}

    def encoder(self):
        return self.backbone


def sizes(cfg: Config, length: int) -> tuple[int, int]:
    """(tokens that are cut, spans) of a text."""
    noise = min(max(round(length * cfg.share), 1), length - 1)
    return noise, max(1, min(round(noise / cfg.span), length - noise))


def spans_of(cfg: Config, length: int, draw: np.random.Generator) -> np.ndarray:
    """bool [length], true where tokens are cut: spans whose number and sum are fixed, at places that are not; the text begins with what is kept."""
    if length < 2:
        return np.zeros(length, bool)
    noise, spans = sizes(cfg, length)

    def parts(total: int) -> np.ndarray:
        ends = np.sort(draw.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff([0, *ends, total])

    return np.repeat(np.tile([False, True], spans), np.stack([parts(length - noise), parts(noise)], 1).ravel())


def replaced(tokens: np.ndarray, cut: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Tokens with each run of `cut` replaced by one sentinel, in their order."""
    begins = cut & ~np.concatenate([[False], cut[:-1]])
    out = tokens.copy()
    out[begins] = sentinels[: begins.sum()]
    return out[~cut | begins]
