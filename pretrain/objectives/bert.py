"""BERT: an encoder predicts the 15 % of the tokens that were masked (arXiv 1810.04805).

    chosen ~ uniform subset of share·n of a row's n tokens, drawn anew each time (RoBERTa, 1907.11692);
             of these, 80 % become [MASK], 10 % a random token, 10 % stay
    loss = −1/m Σ log p(token_t | corrupted row),   over the m chosen tokens of the global batch

Tokens attend within their own document. There is no next-sentence loss and no [CLS]: a text's feature is the mean over
its tokens. Shapes: B rows of T tokens, M = share·T places with a target, D width.
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
    share: float = option(0.15, above=0, high=1)  # share of the tokens that are chosen, and predicted
    masked: float = option(0.8, low=0, high=1)  # share of the chosen tokens that become [MASK]
    random: float = option(0.1, low=0, high=1)  # share that become a random token; the others are not changed

    def check(self) -> None:
        if self.masked + self.random > 1:
            raise ValueError(
                f"objective.masked = {self.masked}, objective.random = {self.random}: are shares of the same tokens;"
                " write values whose sum is at most 1"
            )

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"model": "bert_micro"}]


class BERT(Objective):
    parts = {"tokens": Tokens()}
    validates = True
    target_name = "targets"

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone: Any = backbone()

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        length, vocabulary = about.length, about.vocabulary
        if vocabulary.mask is None:
            raise ValueError(
                f"{vocabulary.source}: this vocabulary has no mask token ([MASK], <mask> or <|mask|>);"
                " use a tokenizer that has one"
            )
        ordinary = np.flatnonzero(~vocabulary.special)
        max_targets = max(1, round(cfg.share * length))

        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            tokens, documents, generator = sample["tokens"][:length].copy(), sample["documents"][:length], rng(MASKS)
            candidates = np.flatnonzero((documents >= 0) & ~vocabulary.special[tokens])
            count = min(len(candidates), max(1, round(cfg.share * len(candidates))))
            chosen = np.sort(generator.permutation(candidates)[:count])
            places, targets = np.zeros(max_targets, np.int64), np.full(max_targets, IGNORED, np.int64)
            places[:count], targets[:count] = chosen, tokens[chosen]
            uniform = generator.random(count)
            tokens[chosen[uniform < cfg.masked]] = vocabulary.mask
            replaced = chosen[(uniform >= cfg.masked) & (uniform < cfg.masked + cfg.random)]
            tokens[replaced] = generator.choice(ordinary, len(replaced))
            return {"tokens": tokens, "documents": documents, "places": places, "targets": targets}

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.backbone(batch["tokens"], documents=batch["documents"]).tokens  # [B, T, D]
        places = batch["places"].unsqueeze(-1).expand(-1, -1, hidden.shape[-1])  # [B, M, D]
        return self.mean(self.backbone.head(hidden.gather(1, places), batch["targets"]), batch), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}
