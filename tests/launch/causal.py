"""A minimal objective on text, next-token prediction, in a file as a user would write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.parts.part import About
from data_pipeline.parts.tokens import Tokens
from pretrain.objectives.base import Exported, Objective
from pretrain.objectives.options import Options


@dataclass
class Config(Options):
    pass


class Causal(Objective):
    parts = {"tokens": Tokens()}

    def __init__(self, cfg: Any, backbone: Any):
        super().__init__(cfg, backbone)
        self.backbone = backbone()

    @staticmethod
    def views(cfg: Any, about: About) -> Any:
        def view(sample: dict[str, Any], rng: Any) -> dict[str, np.ndarray]:
            assert sample["tokens"].shape == (about.length + 1,) and sample["tokens"].max() < about.vocabulary.size
            return {"tokens": sample["tokens"], "documents": sample["documents"]}

        return view

    def forward(self, batch: Any, step: int) -> Any:
        tokens, documents = batch["tokens"], batch["documents"]
        same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
        hidden = self.backbone(tokens[:, :-1], documents=documents[:, :-1]).tokens
        logits = self.backbone.head(hidden)
        loss = (logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0] * same).sum() / -same.sum()
        return loss, {}

    def exports(self) -> dict[str, Exported]:
        return {"model": Exported(self.backbone)}
