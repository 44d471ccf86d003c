"""The part of a sample that is a row of tokens. Rows are cut from the blocks of token shards, which
`unlabeled shards tokenize` makes from text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np

from common.errors import ConfigError
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.token_rows import Packing, Rows
from data_pipeline.shards.vocabulary import Vocabulary

VOCABULARY_MULTIPLE = 64  # error messages suggest a multiple of this as vocab_size, for fast matrix products


@dataclass
class Tokens(Part):
    """A sample has "tokens" int64 [T + 1] and "documents" int32 [T + 1], the document of each token. Documents are
    numbered from 0 in each row, and padding has −1. See `Rows.sample` for "next".
    """

    length: int = 1024  # T, the number of tokens of a row that are predicted
    packing: Packing = "split"
    document_mask: bool = True
    extensions = tuple(Rows.extensions)

    def configured(self, data: Any, model: Any) -> Self:
        length, context = data.length, model.context
        if length is not None and not 1 <= length <= context:
            raise ConfigError(
                f"data.length = {length}: must be at least 1 and at most model.context = {context}; write null for"
                f" rows of {context} tokens, or model.context={length}"
            )
        return dataclasses.replace(
            self, length=length or context, packing=data.packing, document_mask=data.document_mask
        )

    def open(self, specs: Sequence[str], held_out: bool = False, extensions: Sequence[str] = ()) -> Dataset:
        return Rows(specs, self.length, "split" if held_out else self.packing, self.document_mask)

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        vocabulary = cast(Rows, datasets[0]).vocabulary if datasets else Vocabulary.stand_in_for_size(model.vocab_size)
        return {"length": self.length, "vocabulary": vocabulary, "document_mask": self.document_mask}

    def check(self, datasets: Sequence[Dataset], model: Any) -> None:
        first, *others = (cast(Rows, dataset) for dataset in datasets)
        for other in others:
            if other.blocks.hash != first.blocks.hash:
                raise ConfigError(
                    f"{first.names} and {other.names} were made with different tokenizers;"
                    " tokenize the text of the second again with"
                    f" --tokenizer {first.url(0).rpartition('/')[0]}/tokenizer.json"
                )
        if (size := first.vocabulary.size) > (rows := model.vocab_size):
            raise ConfigError(
                f"model.vocab_size = {rows}: the tokenizer of {first.names} has {size} tokens;"
                f" write model.vocab_size={-(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE}"
            )

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        assert about.vocabulary is not None
        tokens = rng.integers(4, about.vocabulary.size, self.length + 1)
        return {"tokens": tokens, "documents": np.zeros(self.length + 1, np.int32)}
