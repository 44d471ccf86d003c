"""Features of labelled texts from a frozen text model, an exported folder with its tokenizer. Shapes: N texts, D
features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import Damaged, DataError
from common.untrusted import loads
from data_pipeline.build.sources.tables import LABEL_FIELDS
from data_pipeline.shards.rows import Rows
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.vocabulary import Vocabulary
from pretrain.models.text_layers import TextBackbone
from pretrain.parallel.device import pick_device


@dataclass
class Labelled:
    """Features [N, D] (fp32, on CPU) and label names of a set."""

    features: Tensor
    labels: list[str]
    left_out: int  # number of damaged samples
    passed_over: int  # number of samples without an image or a text
    hashes: np.ndarray  # uint64, of the image or text of every sample of the set; 0 for samples without one


class TextEncoder:
    """A frozen text model, with the tokenizer in `folder`. `name`: the model's name in result rows. `pool`: which
    feature represents a text, the class token ("cls") or the mean of its tokens ("mean").

    `backbone` may also be a function from a text to features [D]; `folder` is None then.
    """

    unit = "texts"  # the word for samples in messages and results

    def __init__(
        self,
        backbone: TextBackbone | Callable[[str], Tensor],
        name: str,
        folder: Path | None = None,
        pool: str = "mean",
        device: str = "auto",
    ):
        self.backbone: Any = backbone
        self.name, self.folder, self.pool = name, folder, pool
        self.device = pick_device(device, key="eval.device")
        self._labelled: dict[tuple[str, ...], Labelled] = {}
        if folder is not None:
            self.backbone.to(self.device).eval()
            self.vocabulary = Vocabulary.read(str(folder))

    def labelled(self, specs: Sequence[str], batch: int = 32) -> Labelled:
        """Features and labels of all texts in the shards, in order. Damaged texts and samples without a text are left
        out."""
        key = tuple(specs)
        if key not in self._labelled:
            texts, labels, left_out, absent = load_texts(specs)
            if self.folder is not None:
                features = self.pooled(texts, batch)
            else:
                features = torch.stack([self.backbone(text) for text in texts])
            self._labelled[key] = Labelled(features, labels, left_out, absent, Samples(specs).hashes(("txt",)))
        return self._labelled[key]

    @torch.inference_mode()
    def pooled(self, texts: Sequence[str], batch: int = 32) -> Tensor:
        """One vector for each text [N, D]. As in training, a text gets BOS and EOS, and is truncated to the model's
        context."""
        vocabulary, context = self.vocabulary, self.backbone.context
        tokenizer = vocabulary.tokenizer()
        begin, end = ([] if token is None else [token] for token in (vocabulary.bos, vocabulary.eos))
        rows = [
            [*begin, *ids.ids, *end][:context] for ids in tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # rows of similar length need little padding
        out = torch.zeros(len(rows), self.backbone.embed_dim)
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            tokens = torch.zeros(len(chosen), max(1, *(len(rows[n]) for n in chosen)), dtype=torch.long)  # [B, T]
            documents = torch.full_like(tokens, -1)
            for b, n in enumerate(chosen):
                tokens[b, : len(rows[n])], documents[b, : len(rows[n])] = torch.tensor(rows[n]), 0
            features = self.backbone(tokens.to(self.device), documents=documents.to(self.device))
            is_token = (documents >= 0).unsqueeze(-1).to(self.device)  # [B, T, 1], false for padding
            mean = (features.tokens * is_token).sum(1) / is_token.sum(1).clamp_min(1)  # [B, D]
            out[chosen] = (features.cls if self.pool == "cls" else mean).float().cpu()
        return out

    def rows(self, specs: Sequence[str], length: int | None, document_mask: bool) -> Rows:
        """Token sets as rows of `length` tokens; default: the model's context.

        Raises DataError for sets that were made with another tokenizer than the model's.
        """
        if not specs:
            raise DataError("no token set is named; write eval.val=… (or query=… for `unlabeled eval`)")
        rows = Rows(specs, length or self.backbone.context, "split", document_mask)
        if rows.blocks.hash != self.vocabulary.hash:
            raise DataError(
                f"{rows.names}: was made with another tokenizer than {self.folder};"
                f" tokenize its text with --tokenizer {self.folder}/tokenizer.json"
            )
        return rows


def name_of(facts: dict[str, Any]) -> str:
    """The name of a model in result rows: the name of a student in a distillation, "untrained" for step 0, or
    "pretrained"."""
    return facts.get("student") or ("untrained" if facts.get("step") == 0 else "pretrained")


def load_texts(specs: Sequence[str]) -> tuple[list[str], list[str], int, int]:
    """(texts, labels, number of damaged texts, number of samples without a text) of labelled text shards.

    The label is the first of the fields "label", "class", … of the .json member, or else the .cls member.
    """
    if not specs:
        raise DataError(
            "no labelled text shards are named; write eval.gallery=… and eval.test=… (or gallery=… query=… for"
            " `unlabeled eval`)"
        )
    samples = Samples(specs)
    if "txt" not in samples.extensions:
        present = ", ".join(f".{e}" for e in samples.extensions)
        raise DataError(f"{samples.names}: holds {present} and no .txt; make text shards with `unlabeled shards build`")
    texts, labels, absent = [], [], 0
    for number in range(len(samples)):
        try:
            members = samples.read(number, ("txt", "json"))
            if "txt" not in members:
                absent += 1
                continue
            text, row = members["txt"].decode(), loads(members.get("json", b"{}"))
        except (Damaged, ValueError):  # ValueError: invalid UTF-8 or JSON
            continue
        if not isinstance(row, dict):
            continue
        texts.append(text)
        labels.append(_label(samples, number, row))
    if not texts:
        raise DataError(f"{samples.names}: none of the {len(samples)} texts can be read")
    return texts, labels, len(samples) - len(texts) - absent, absent


def label_of(samples: Samples, number: int) -> str:
    """The label of a text: a field of the .json member, or else the .cls member.

    Raises DataError if it has no label, and Damaged if the label cannot be read.
    """
    try:
        row = loads(samples.read(number, ("json",)).get("json", b"{}"))
    except ValueError:
        raise Damaged("its .json member is not valid JSON") from None
    return _label(samples, number, row if isinstance(row, dict) else {})


def _label(samples: Samples, number: int, row: dict[str, Any]) -> str:
    """The label of a text. `row`: the content of its .json member."""
    field = next((name for name in LABEL_FIELDS if name in row), None)
    return samples.label(number) if field is None else str(row[field])


def bytes_of(text: str) -> Tensor:
    """The relative frequencies of the bytes in a text, [256]: the baseline for features of texts."""
    counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    return torch.from_numpy(counts / max(1, counts.sum())).float()
