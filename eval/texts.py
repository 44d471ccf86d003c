"""Frozen language models as protocols see them: an exported folder with its tokenizer; and features of labelled texts. N texts, D features."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.decode import Damaged
from data_pipeline.rows import Rows
from data_pipeline.shards import Samples
from data_pipeline.sources.tables import LABEL_FIELDS
from data_pipeline.storage import DataError
from data_pipeline.vocabulary import Vocabulary
from pretrain.models.text_layers import TextBackbone


@dataclass
class Labelled:
    """Features [N, D] (fp32, on CPU) and label names of a set; `left_out` samples could not be read."""

    features: Tensor
    labels: list[str]
    left_out: int


class TextEncoder:
    """A frozen text model; `name` stands in result rows, `pool` is the feature that stands for a text: `cls` or the `mean` of its tokens.

    In place of a model, what makes features [D] of a text: then there are neither tokens nor a `folder`.
    """

    def __init__(
        self,
        backbone: TextBackbone | Callable[[str], Tensor],
        name: str,
        folder: Path | None = None,
        pool: str = "mean",
    ):
        self.backbone: Any = backbone
        self.name, self.folder, self.pool = name, folder, pool
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._kept: dict[tuple[str, ...], Labelled] = {}
        if folder is not None:
            self.backbone.to(self.device).eval()
            self.vocabulary = Vocabulary.read(str(folder))

    def labelled(self, specs: Sequence[str], batch: int = 32) -> Labelled:
        """Features and labels of all texts in the shards, in order; damaged texts are left out and counted."""
        key = tuple(specs)
        if key not in self._kept:
            texts, labels, left_out = load_texts(specs)
            features = (
                self.pooled(texts, batch) if self.folder is not None else torch.stack(list(map(self.backbone, texts)))
            )
            self._kept[key] = Labelled(features, labels, left_out)
        return self._kept[key]

    @torch.inference_mode()
    def pooled(self, texts: Sequence[str], batch: int = 32) -> Tensor:
        """One vector per text [N, D]. A text stands between BOS and EOS, as in training, and is cut to the model's context."""
        vocabulary, context = self.vocabulary, self.backbone.context
        tokenizer = vocabulary.tokenizer()
        begin, end = ([] if token is None else [token] for token in (vocabulary.bos, vocabulary.eos))
        rows = [
            [*begin, *ids.ids, *end][:context] for ids in tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        out = torch.zeros(len(rows), self.backbone.embed_dim)
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            tokens = torch.zeros(len(some), max(1, *(len(rows[n]) for n in some)), dtype=torch.long)
            documents = torch.full_like(tokens, -1)
            for place, n in enumerate(some):
                tokens[place, : len(rows[n])], documents[place, : len(rows[n])] = torch.tensor(rows[n]), 0
            features = self.backbone(tokens.to(self.device), documents=documents.to(self.device))
            seen = (documents >= 0).unsqueeze(-1).to(self.device)
            mean = (features.tokens * seen).sum(1) / seen.sum(1).clamp_min(1)
            out[some] = (features.cls if self.pool == "cls" else mean).float().cpu()
        return out

    def rows(self, specs: Sequence[str], length: int | None, document_mask: bool) -> Rows:
        """Token sets as rows of so many tokens (null: the model's context). DataError where another tokenizer made them."""
        if not specs:
            raise DataError("no token set is named; write eval.val=… (or query=… for `unlabeled eval`)")
        rows = Rows(specs, length or self.backbone.context, "split", document_mask)
        if rows.blocks.hash != self.vocabulary.hash:
            raise DataError(
                f"{rows.names}: was made with another tokenizer than {self.folder};"
                f" tokenize its text with --tokenizer {self.folder}/tokenizer.json"
            )
        return rows


def name_of(about: dict[str, Any]) -> str:
    """What stands in result rows: the student's name, or whether it is the untrained network."""
    return about.get("student") or ("untrained" if about.get("step") == 0 else "pretrained")


def load_texts(specs: Sequence[str]) -> tuple[list[str], list[str], int]:
    """(texts, labels, how many were damaged) of text shards whose rows had a label ("label", "class", …), or that have .cls members."""
    if not specs:
        raise DataError(
            "no labelled text shards are named; write eval.gallery=… and eval.test=… (or gallery=… query=… for `unlabeled eval`)"
        )
    samples = Samples(specs)
    if "txt" not in samples.extensions:
        held = ", ".join(f".{e}" for e in samples.extensions)
        raise DataError(f"{samples.names}: holds {held} and no .txt; make text shards with `unlabeled shards build`")
    texts, labels = [], []
    for number in range(len(samples)):
        try:
            members = samples.read(number, ("txt", "json"))
            text, row = members["txt"].decode(), json.loads(members.get("json", b"{}"))
        except (Damaged, KeyError, ValueError):  # ValueError: no UTF-8, or no JSON
            continue
        if not isinstance(row, dict):
            continue
        texts.append(text)
        field = next((name for name in LABEL_FIELDS if name in row), None)
        labels.append(samples.label(number) if field is None else str(row[field]))
    if not texts:
        raise DataError(f"{samples.names}: none of the {len(samples)} texts can be read")
    return texts, labels, len(samples) - len(texts)


def bytes_of(text: str) -> Tensor:
    """How often each byte stands in a text, as shares [256]: the floor that a language model's features have to beat."""
    counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    return torch.from_numpy(counts / max(1, counts.sum())).float()
