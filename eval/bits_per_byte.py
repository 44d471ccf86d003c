"""Bits per byte: the number of bits that a decoder needs for a byte of held-out text. Models with different tokenizers
can be compared by it.

    −Σ log₂ p(token | the tokens before it in its document and row) / Σ bytes of these tokens

Every token of every document is predicted once, including the token that ends a document, which has no bytes. Only the
first token of a document (BOS, if the tokenizer has one) is given. Consecutive rows of `length` tokens are scored, so
the first tokens of a row have little context. The bytes are those of the original text: for a tokenizer that changes
text (NFC, lower case) they are taken from the documents, which needs a BOS token. Text that a tokenizer does not know
costs almost no bits. Therefore a set with more than MAX_UNKNOWN_SHARE of it is refused; a smaller share is reported as
`unknown_share`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.config import Section, option
from common.errors import Damaged, UserError
from data_pipeline.shards.token_rows import IGNORED, Rows, targets_of
from data_pipeline.shards.vocabulary import is_byte_level
from eval.text_features import TextEncoder
from pretrain.models.families import Decoder

NEEDS = "tokens"
UNIT = "bytes"
VERSION = 1
MAX_UNKNOWN_SHARE = 0.001  # of the tokens, for those that stand for text that the tokenizer does not know


@dataclass
class Config(Section):
    length: int | None = option(None, low=1)  # number of tokens in a row; null: the model's context
    # whether tokens attend to their own document only; false for a model that was trained without data.document_mask
    document_mask: bool = True
    batch: int = option(16, low=1)  # number of rows in a batch


def run(encoder: TextEncoder, gallery: Sequence[str], query: Sequence[str], cfg: Config) -> dict[str, float]:
    """{"bits_per_byte", "bits_per_token", "unigram", "count": number of bytes}, and "unknown_share" if it is not 0.

    "unigram": the bits per byte with the token frequencies of the text itself, a baseline without any context.
    """
    if encoder.folder is None or not encoder.backbone.cfg.causal:
        raise UserError(
            f"{encoder.folder or encoder.name}: bits per byte are defined for a decoder, which this is not; use linear"
        )
    _check(cfg, encoder.backbone.cfg)
    rows, vocabulary = encoder.rows(query, cfg.length, cfg.document_mask), encoder.vocabulary
    byte_level = is_byte_level(json.loads(vocabulary.text))
    if not byte_level and vocabulary.bos is None:
        raise UserError(
            f"{vocabulary.source}: is not byte-level and has no token that begins a document, so the bytes of the"
            " predicted tokens are not known; tokenize with a tokenizer that is byte-level, or has such a token"
        )
    bits, counts = 0.0, np.zeros(encoder.backbone.vocab_size, np.int64)
    with torch.inference_mode():
        for first in range(0, len(rows), cfg.batch):
            tokens, documents, targets = batch(rows, range(first, min(first + cfg.batch, len(rows))))
            mask = {"documents": documents[:, :-1].to(encoder.device)} if cfg.document_mask else {}
            hidden = encoder.backbone(tokens[:, :-1].to(encoder.device), **mask).tokens
            bits += float(encoder.backbone.head(hidden, targets.to(encoder.device))) / math.log(2)
            counts += np.bincount(targets[targets != IGNORED].numpy(), minlength=len(counts))
    size = int(counts[: vocabulary.size] @ vocabulary.token_bytes) if byte_level else rows.blocks.text_bytes()
    if not size:
        raise UserError(f"{rows.names}: holds no text")
    unknown = (rows.blocks.lost + (0 if vocabulary.unk is None else int(counts[vocabulary.unk]))) / int(counts.sum())
    if unknown > MAX_UNKNOWN_SHARE:
        raise UserError(
            f"{rows.names}: {unknown:.1%} of its tokens stand for text that the tokenizer does not know, so its bits"
            f" per byte would be meaningless (at most {MAX_UNKNOWN_SHARE:.1%} may); tokenize with a byte-level"
            " tokenizer, `unlabeled shards tokenize TEXT TARGET --vocab N`"
        )
    frequencies = counts[counts > 0] / counts.sum()
    unigram = float(-(counts.sum() * frequencies * np.log2(frequencies)).sum())  # bits of the whole text
    return {
        "bits_per_byte": bits / size,
        "bits_per_token": bits / int(counts.sum()),
        "unigram": unigram / size,
        **({"unknown_share": unknown} if unknown else {}),
        "count": float(size),
    }


def _check(cfg: Config, model: Decoder) -> None:
    """Raises UserError for rows that the model cannot read."""
    if cfg.length is not None and cfg.length > model.context and model.positions == "learned":
        raise UserError(
            f"bits_per_byte.length = {cfg.length}: must be at most {model.context}, the number of positions that the"
            " model has learned"
        )


def batch(rows: Rows, numbers: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [B, T + 1], documents [B, T + 1], targets [B, T]) of the rows with the given numbers.

    Raises UserError for a damaged row, because a score without it could not be compared with others.
    """
    samples = []
    for number in numbers:
        try:
            samples.append(rows.sample(number, rows.read_columns(number, [0, 1]), None))
        except Damaged as reason:
            raise UserError(
                f"{' '.join(rows.name(number))}: {reason}; `unlabeled shards verify` lists all damage"
            ) from None
    tokens, documents = (np.stack([s[key] for s in samples]) for key in ("tokens", "documents"))
    targets = np.stack([targets_of(s) for s in samples])
    return torch.from_numpy(tokens), torch.from_numpy(documents), torch.from_numpy(targets)
