"""A caption: a text that belongs to a sample, with its tokens if the recipe names a tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from common.errors import Damaged
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.vocabulary import Vocabulary


@dataclass
class Caption(Part):
    """A caption is decoded to a str. Views turn it into tokens with `token_row`."""

    tokenizer: str = ""  # a tokenizer.json, or a folder with one; a path or a URL
    length: int = 64  # tokens of a caption, with padding
    extensions = ("txt",)

    def configured(self, data: Any, model: Any) -> Self:
        return dataclasses.replace(self, tokenizer=data.tokenizer, length=data.length or self.length)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        return Vocabulary.read(self.tokenizer) if self.tokenizer else None

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        return {"length": self.length, "vocabulary": self.vocabulary}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> str:
        try:
            return members["txt"].decode()
        except UnicodeDecodeError as error:
            raise Damaged(f"its text is not UTF-8 ({error.reason} at byte {error.start})") from None

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        return {name: " ".join(f"word{n}" for n in rng.integers(0, 1000, 8))}


def token_row(text: str, about: About, tokenizer: Any) -> np.ndarray:
    """A text as int64 [length]: BOS, its tokens, truncated if necessary, EOS, and padding of −1.

    `tokenizer`: `about.vocabulary.tokenizer()`, which the caller opens once.
    """
    vocabulary = about.vocabulary
    assert vocabulary is not None
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    first = [vocabulary.bos] if vocabulary.bos is not None else []
    last = [vocabulary.eos] if vocabulary.eos is not None else []
    ids = [*first, *ids[: about.length - len(first) - len(last)], *last]
    out = np.full(about.length, -1, np.int64)
    out[: len(ids)] = ids
    return out
