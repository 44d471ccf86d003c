"""GPT: a decoder predicts each token from the previous tokens of its document (Radford et al. 2018, 2019; LLaMA: arXiv
2302.13971).

    loss = −1/n Σ log p(token_t | token_<t) + z_loss · logsumexp(logits_t)²,   over the n targets of the global batch

The last token of a document has no target. If `data.document_mask` is false, a row counts as one text, so that this
token predicts the first token of the next document. Shapes: B rows of T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from common.config import option
from data_pipeline.parts.part import About
from data_pipeline.parts.tokens import Tokens
from data_pipeline.shards.token_rows import targets_of
from data_pipeline.views.augmentations import Rng
from pretrain.objectives.base import Batch, Builder, Exported, Objective, Sample, View
from pretrain.objectives.options import Options


@dataclass
class Config(Options):
    # weight of the z-loss, which keeps the normaliser of the softmax near 1 (arXiv 2204.02311); OLMo 1e-5, PaLM 1e-4
    z_loss: float = option(0.0, low=0)

    @classmethod
    def tiny(cls) -> list[dict[str, Any]]:
        return [{"model": "gpt_micro"}]


class GPT(Objective):
    parts = {"tokens": Tokens()}
    validates = True
    target_name = "targets"

    def __init__(self, cfg: Config, backbone: Builder) -> None:
        super().__init__(cfg, backbone)
        self.backbone: Any = backbone()
        if not self.backbone.causal:
            raise ValueError("model.bidirectional = true: tokens would see the ones to predict; remove it")

    @staticmethod
    def views(cfg: Config, about: About) -> View:
        def view(sample: Sample, rng: Rng) -> dict[str, np.ndarray]:
            tokens, documents = sample["tokens"], sample["documents"]
            row = {"tokens": tokens[:-1], "targets": targets_of(sample)}
            return row | ({"documents": documents[:-1]} if about.document_mask else {})

        return view

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.backbone(batch["tokens"], documents=batch.get("documents")).tokens  # [B, T, D]
        return self.mean(self.backbone.head(hidden, batch["targets"], self.cfg.z_loss), batch), {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone, "mean")}
