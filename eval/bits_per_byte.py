"""Bits per byte: how many bits a decoder needs for a byte of held-out text, whatever its tokenizer.

    −Σ log₂ p(token | the tokens before it in its document and row) / Σ bytes of these tokens

Every token of every document is predicted once, the one that ends a document among them, which has no bytes; only a document's first token
(BOS, where the tokenizer has one) is given. Rows of `length` tokens follow on one another, so a row's first tokens see little before them.
Bytes are those of the text as it was: a tokenizer that changes text before it cuts it (NFC, lower case) has those of its documents, and has to have a BOS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.decode import Damaged
from data_pipeline.rows import IGNORED, Rows, next_tokens
from data_pipeline.vocabulary import is_byte_level
from eval.texts import TextEncoder
from pretrain.config import Section
from pretrain.errors import UserError
from pretrain.models.presets import Decoder

VERSION = 1


@dataclass
class Config(Section):
    length: int | None = None  # tokens of a row; null: the model's context
    document_mask: bool = True  # false: a row's earlier documents are seen, as a model that was trained so expects
    batch: int = 16  # rows at a time


def run(encoder: TextEncoder, gallery: Sequence[str], query: Sequence[str], cfg: Config) -> dict[str, float]:
    """Bits per byte, bits per token, and `unigram`: the bits per byte of the text's own token frequencies, which context has to beat."""
    if encoder.folder is None or not isinstance(encoder.backbone.cfg, Decoder):
        raise UserError(
            f"{encoder.folder or encoder.name}: bits per byte are those of a decoder, and this is none; use linear"
        )
    _check(cfg, encoder.backbone.cfg)
    rows, vocabulary = encoder.rows(query, cfg.length, cfg.document_mask), encoder.vocabulary
    byte_level = is_byte_level(json.loads(vocabulary.text))
    if not byte_level and vocabulary.bos is None:
        raise UserError(
            f"{vocabulary.source}: is not byte-level and has no token that begins a document, so the bytes of what is predicted are not known;"
            " tokenize with one that is, or has"
        )
    bits, counts = 0.0, np.zeros(encoder.backbone.vocab_size, np.int64)
    with torch.inference_mode():
        for first in range(0, len(rows), cfg.batch):
            tokens, documents, targets = batch(rows, range(first, min(first + cfg.batch, len(rows))))
            seen = {"documents": documents[:, :-1].to(encoder.device)} if cfg.document_mask else {}
            hidden = encoder.backbone(tokens[:, :-1].to(encoder.device), **seen).tokens
            bits += float(encoder.backbone.head(hidden, targets.to(encoder.device))) / math.log(2)
            counts += np.bincount(targets[targets != IGNORED].numpy(), minlength=len(counts))
    size = int(counts[: vocabulary.size] @ vocabulary.token_bytes) if byte_level else rows.blocks.text_bytes()
    if not size:
        raise UserError(f"{rows.names}: holds no text")
    shares = counts[counts > 0] / counts.sum()
    unigram = float(-(counts.sum() * shares * np.log2(shares)).sum())
    return {
        "bits_per_byte": bits / size,
        "bits_per_token": bits / int(counts.sum()),
        "unigram": unigram / size,
        "bytes": float(size),
    }


def _check(cfg: Config, model: Decoder) -> None:
    """Raises UserError for rows that the model cannot read."""
    if cfg.batch < 1:
        raise UserError(f"bits_per_byte.batch = {cfg.batch}: must be 1 or more")
    if cfg.length is not None and cfg.length < 1:
        raise UserError(f"bits_per_byte.length = {cfg.length}: must be 1 or more, or null for the model's context")
    if cfg.length is not None and cfg.length > model.context and model.positions == "learned":
        raise UserError(
            f"bits_per_byte.length = {cfg.length}: must be at most {model.context}, the positions that the model has learned"
        )


def batch(rows: Rows, numbers: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens and documents [B, T + 1], targets [B, T]. A damaged row is an error: a score that leaves text out compares with none."""
    samples = []
    for number in numbers:
        try:
            samples.append(rows.sample(number, rows.read_columns(number, [0, 1]), None))
        except Damaged as reason:
            raise UserError(f"{' '.join(rows.name(number))}: {reason}; `unlabeled shards verify` names all") from None
    tokens, documents = (np.stack([s[key] for s in samples]) for key in ("tokens", "documents"))
    targets = np.stack([next_tokens(s["tokens"], s["documents"]) for s in samples])
    return torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(targets)
