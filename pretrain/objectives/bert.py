"""BERT: an encoder restores the 15 % of the tokens that were hidden from it (arXiv 1810.04805), other ones each time (RoBERTa, 1907.11692).

    hidden ~ uniform subset of share·n of a row's n tokens;   of these, 80 % become [MASK], 10 % any token, 10 % stay
    loss = −1/m Σ log p(token_t | corrupted row),   over the m hidden tokens of the global batch

Tokens attend to their own document. There is no second sentence and no [CLS]: an encoder's feature is the mean over its tokens.
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
    share: float = 0.15  # of the tokens that are to be restored
    masked: float = 0.8  # of these, that become [MASK]
    random: float = 0.1  # that become any token; the rest stays


class BERT(Objective):
    reads = "text"
    pool = "mean"
    counted = "targets"

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        if not 0 < cfg.share <= 1:
            raise ValueError(f"objective.share = {cfg.share}: must be above 0 and at most 1")
        if min(cfg.masked, cfg.random) < 0 or cfg.masked + cfg.random > 1:
            raise ValueError(
                f"objective.masked = {cfg.masked}, objective.random = {cfg.random}: shares of a whole, so their sum must be at most 1"
            )
        self.backbone = backbone()

    @staticmethod
    def views(cfg, length, vocabulary, document_mask):
        if vocabulary.mask is None:
            raise ValueError(
                f"{vocabulary.source}: has no token for masks ([MASK], <mask> or <|mask|>); tokenize with one that has"
            )
        ordinary = np.flatnonzero(~vocabulary.special)
        most = max(1, round(cfg.share * length))

        def view(sample, rng):
            tokens, documents, draw = sample["tokens"][:length].copy(), sample["documents"][:length], rng(MASKS)
            candidates = np.flatnonzero((documents >= 0) & ~vocabulary.special[tokens])
            count = min(len(candidates), max(1, round(cfg.share * len(candidates))))
            chosen = np.sort(draw.permutation(candidates)[:count])
            places, targets = np.zeros(most, np.int64), np.full(most, IGNORED, np.int64)
            places[:count], targets[:count] = chosen, tokens[chosen]
            fate = draw.random(count)
            tokens[chosen[fate < cfg.masked]] = vocabulary.mask
            other = chosen[(fate >= cfg.masked) & (fate < cfg.masked + cfg.random)]
            tokens[other] = draw.choice(ordinary, len(other))
            return {"tokens": tokens, "documents": documents, "places": places, "targets": targets}

        return view

    def forward(self, batch, step):
        hidden = self.backbone(batch["tokens"], documents=batch["documents"]).tokens  # [B, T, D]
        places = batch["places"].unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.mean(self.backbone.head(hidden.gather(1, places), batch["targets"]), batch), {}

    def encoder(self):
        return self.backbone
