"""A caption: a text that belongs to a sample, with its tokens if the recipe names a tokenizer."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from common.errors import Absent, ConfigError, Damaged
from common.untrusted import loads
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.vocabulary import Vocabulary

CHECKED_SAMPLES = 8  # samples of a dataset in which `Caption.check` looks for the field of the captions
STAND_IN_WORDS = 256  # size of the vocabulary of a plan or a test without a tokenizer


@dataclass
class Caption(Part):
    """A caption is the `.txt` member, or a field of the `.json` member (`data.captions`), which holds a text or a list
    of texts. It is decoded to a str, or to a list of str. Views turn it into tokens with `CaptionTokens`."""

    tokenizer: str = ""  # a tokenizer.json, or a folder with one; a path or a URL
    length: int = 64  # tokens of a caption, with padding
    field: str = ""  # of the .json member; "": the .txt member
    extensions: tuple[str, ...] = ("txt",)  # type: ignore[misc]  # follows from `field`

    def configured(self, data: Any, model: Any) -> Self:
        return dataclasses.replace(
            self,
            tokenizer=data.tokenizer,
            length=data.length or self.length,
            field=data.captions,
            extensions=("json",) if data.captions else self.extensions,
        )

    @cached_property
    def vocabulary(self) -> Vocabulary | None:  # type: ignore[override]
        return Vocabulary.read(self.tokenizer) if self.tokenizer else None

    def check(self, datasets: Sequence[Dataset], model: Any) -> None:
        super().check(datasets, model)
        for dataset in datasets if self.field else ():
            problems = [self._problem(dataset, number) for number in range(min(CHECKED_SAMPLES, len(dataset)))]
            if problems and all(problems):
                raise ConfigError(
                    f"data.captions = {self.field}: none of the first {len(problems)} samples of {dataset.names} has"
                    f" such a caption; the first one {problems[0]}"
                )

    def _problem(self, dataset: Any, number: int) -> str:
        """Why a sample has no caption, or ""."""
        try:
            self.decode(dataset.read(number, self.extensions), {})
        except KeyError:
            return "has no .json member"
        except Damaged as reason:
            return str(reason)
        return ""

    def about(self, datasets: Sequence[Dataset] | None, model: Any) -> dict[str, Any]:
        stand_in = Vocabulary.stand_in_for_size(STAND_IN_WORDS) if datasets is None else None
        return {"length": self.length, "vocabulary": self.vocabulary or stand_in}

    def decode(self, members: dict[str, bytes], known: dict[str, Any]) -> str | list[str]:
        return self._field_of(members["json"]) if self.field else _text(members["txt"])

    def _field_of(self, member: bytes) -> str | list[str]:
        try:
            row = loads(member)
        except ValueError as error:
            raise Damaged(f"its .json member is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise Damaged("its .json member is not an object")
        value = row.get(self.field)
        if value is None or value == []:
            fields = ", ".join(sorted(row)[:10])
            raise Absent(f"has no field {self.field!r} with a caption in its .json member; its fields: {fields}")
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            return value
        raise Damaged(f"its field {self.field!r} is neither a text nor a list of texts")

    def stand_in(self, name: str, rng: np.random.Generator, about: About) -> dict[str, Any]:
        return {name: " ".join(f"word{n}" for n in rng.integers(0, 1000, 8))}


def _text(member: bytes) -> str:
    try:
        return member.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"its text is not UTF-8 ({error.reason} at byte {error.start})") from None


class CaptionTokens:
    """Turns the caption of a sample into tokens of a text model, whose options `model` has.

    Raises ValueError if the recipe names no tokenizer, or if the tokens do not fit the text model. `key`: the name of
    the section of the text model, for messages.
    """

    def __init__(self, about: About, model: Any, key: str):
        vocabulary, vocab_size, context = about.vocabulary, model.vocab_size, model.context
        if vocabulary is None:
            raise ValueError(
                "data.tokenizer is empty, but captions are tokenized; name a tokenizer.json or a folder with one"
                " (`unlabeled shards tokenizer TEXT FILE` makes one)"
            )
        if vocabulary.eos is None:
            raise ValueError(f"{vocabulary.source}: this vocabulary has no token that ends a text; use one that has it")
        if vocabulary.size > vocab_size:
            raise ValueError(
                f"{key}.vocab_size = {vocab_size}: the tokenizer {vocabulary.source} has {vocabulary.size} tokens;"
                f" write {key}.vocab_size={-(-vocabulary.size // 64) * 64}"
            )
        if about.length > context:
            raise ValueError(
                f"data.length = {about.length}: is more than {key}.context = {context}; write data.length={context}"
            )
        self.about, self.pad = about, padding(vocabulary)
        self.tokenizer = vocabulary.tokenizer() if vocabulary.text else _StandIn(vocabulary)

    def __call__(self, captions: str | list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """{"tokens": int64 [length], padded with `padding`; "last": int64 [], the place of EOS} of the caption. Of
        several ones, one is drawn."""
        text = captions if isinstance(captions, str) else captions[rng.integers(len(captions))]
        row = token_row(text, self.about, self.tokenizer)
        last = np.asarray((row >= 0).sum() - 1, np.int64)
        return {"tokens": np.where(row >= 0, row, self.pad), "last": last}


def padding(vocabulary: Vocabulary) -> int:
    """The token that pads captions: PAD, or EOS if the vocabulary has no PAD."""
    return next(token for token in (vocabulary.pad, vocabulary.eos, 0) if token is not None)


class _StandIn:
    """A tokenizer for plans and tests that have none: each word becomes a token that is no special token."""

    def __init__(self, vocabulary: Vocabulary):
        self.ordinary = np.flatnonzero(~vocabulary.special).tolist()

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        self.ids = [self.ordinary[zlib.crc32(word.encode()) % len(self.ordinary)] for word in text.split()]
        return self


def token_row(text: str, about: About, tokenizer: Any) -> np.ndarray:
    """A text as int64 [length]: BOS, its tokens, truncated if necessary, EOS, and padding of −1. A BOS that is the same
    token as EOS is left out, so that the first EOS of a caption is its end.

    `tokenizer`: `about.vocabulary.tokenizer()`, which the caller opens once.
    """
    vocabulary = about.vocabulary
    assert vocabulary is not None
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    first = [vocabulary.bos] if vocabulary.bos is not None and not vocabulary.joined else []
    last = [vocabulary.eos] if vocabulary.eos is not None else []
    ids = [*first, *ids[: about.length - len(first) - len(last)], *last]
    out = np.full(about.length, -1, np.int64)
    out[: len(ids)] = ids
    return out
