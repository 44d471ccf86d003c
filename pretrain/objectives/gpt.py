"""GPT: a decoder predicts each token from those before it in its document (Radford et al. 2018, 2019; LLaMA: arXiv 2302.13971).

    loss = −1/n Σ log p(token_t | token_<t) + z_loss · logsumexp(logits_t)²,   over the n targets of the global batch

The last token of a document predicts nothing, unless `data.document_mask` is false: then rows are texts in which documents follow on one another.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.rows import next_tokens
from pretrain.config import Section
from pretrain.objectives.base import Objective


@dataclass
class Config(Section):
    z_loss: float = 0.0  # keeps the softmax's normaliser near 1 (arXiv 2204.02311); 1e-5 in OLMo, 1e-4 in PaLM


class GPT(Objective):
    reads = "text"
    pool = "mean"
    counted = "targets"

    def __init__(self, cfg, backbone):
        super().__init__(cfg, backbone)
        self.backbone = backbone()

    @staticmethod
    def views(cfg, length, vocabulary, document_mask):
        def view(sample, rng):
            tokens, documents = sample["tokens"], sample["documents"]
            row = {"tokens": tokens[:-1], "targets": next_tokens(tokens, documents)}
            return row | ({"documents": documents[:-1]} if document_mask else {})

        return view

    def forward(self, batch, step):
        hidden = self.backbone(batch["tokens"], documents=batch.get("documents")).tokens
        return self.mean(self.backbone.head(hidden, batch["targets"], self.cfg.z_loss), batch), {}

    def encoder(self):
        return self.backbone
