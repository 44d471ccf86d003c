"""Features of texts from a frozen text model, an exported folder with its tokenizer. Shapes: N texts, D
features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import Absent, Damaged, DataError
from common.untrusted import loads
from data_pipeline.build.sources.tables import LABEL_FIELDS
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_rows import Rows
from data_pipeline.shards.vocabulary import Vocabulary
from eval import feature_cache
from eval.feature_cache import Unlabelled
from pretrain.models.text_layers import TextBackbone
from pretrain.parallel.device import pick_device


class TextEncoder(feature_cache.Source):
    """A frozen text model, with the tokenizer in `folder`. `name`: the model's name in result rows. `pool`: which
    feature represents a text, the class token ("cls") or the mean of its tokens ("mean").

    `backbone` may also be a function from a text to features [D]; `folder` is None then, and `name` identifies the
    function in the cache of features. `cache`: the folder of that cache; None: the user's (see `feature_cache.py`).
    """

    unit = "texts"
    batch = 256  # texts are sorted by length inside it
    members = ("txt",)

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
        if folder is not None:
            self.backbone.to(self.device).eval()
            self.vocabulary = Vocabulary.read(str(folder))

    def check(self, specs: Sequence[str]) -> Samples:
        samples = Samples(specs)
        if "txt" not in samples.extensions:
            present = ", ".join(f".{e}" for e in samples.extensions)
            raise DataError(
                f"{samples.names}: holds {present} and no .txt; make text shards with `unlabeled shards build`"
            )
        return samples

    @cached_property
    def model_hash(self) -> str:
        if self.folder is None:
            return self.name
        return f"{feature_cache.model_hash(self.backbone)} {self.vocabulary.hash}"

    def fingerprint(self, samples: Samples) -> str:
        return f"{self.model_hash} {self.pool} {[each.manifest.classes for each in samples.manifests]}"

    def read(self, samples: Samples, number: int) -> str:
        return text_of(samples, number)

    def stand_in(self) -> str:
        return ""

    def label(self, samples: Samples, number: int) -> str:
        return label_of(samples, number)

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """One vector for each text [N, D], fp32, on the CPU."""
        if self.folder is None:
            return torch.stack([self.backbone(text) for text in texts])
        return self._encoded(texts)

    @torch.inference_mode()
    def _encoded(self, texts: Sequence[str], batch: int = 32) -> Tensor:
        """The features of texts [N, D]. As in training, a text gets BOS and EOS, and is truncated to the model's
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


def text_of(samples: Samples, number: int) -> str:
    """The text of a sample. Raises Absent if it has none, and Damaged if it cannot be read."""
    data = samples.read(number, ("txt",)).get("txt")
    if data is None:
        raise Absent("holds no .txt member")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Damaged("its .txt member is not valid UTF-8") from None


def label_of(samples: Samples, number: int) -> str:
    """The label of a text: the first of the fields "label", "class", … of the .json member, or else the .cls member.

    Raises Unlabelled if the label is null, or if it has no label, but other samples of the set have a .cls member;
    DataError if it has no label otherwise, and Damaged if it cannot be read.
    """
    try:
        row = loads(samples.read(number, ("json",)).get("json", b"{}"))
    except ValueError:
        raise Damaged("its .json member is not valid JSON") from None
    if not isinstance(row, dict):
        raise Damaged("its .json member is not an object")
    field = next((name for name in LABEL_FIELDS if name in row), None)
    if field is None:
        return feature_cache.label_of(samples, number)
    if row[field] is None:
        raise Unlabelled(f"its {field} is null")
    return str(row[field])


def bytes_of(text: str) -> Tensor:
    """The relative frequencies of the bytes in a text, [256]: the baseline for features of texts."""
    counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    return torch.from_numpy(counts / max(1, counts.sum())).float()
