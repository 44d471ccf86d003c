"""What a tokenizer.json says, without the package that tokenizes: how many tokens there are, which are special, and how many bytes each stands for.

A token set carries its tokenizer.json; `Vocabulary.read` is all that training needs of it. Roles are found by the names that special tokens go by, or by
those that a tokenizer_config.json beside it gives.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from data_pipeline.fetch import Missing, patiently
from data_pipeline.storage import DataError, open_store

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTINEL = re.compile(r"^<\|?extra_id_(\d+)\|?>$")
ROLES = {  # the first name that a tokenizer has
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "mask": ("<|mask|>", "<mask>", "[MASK]"),
}


@dataclass(frozen=True)
class Vocabulary:
    """`size` is the highest id + 1. A role that the tokenizer has no token for is None; `sentinels` are T5's, <extra_id_0> first."""

    size: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    source: str = ""  # where it was read, for errors
    text: str = field(default="", repr=False, compare=False)  # the whole tokenizer.json
    config: str = field(default="", repr=False, compare=False)  # and tokenizer_config.json, where there is one

    @classmethod
    def read(cls, url: str) -> Vocabulary:
        """From a tokenizer.json, or a folder that holds one; local or any URL. Raises DataError."""
        file = url if url.endswith(".json") else f"{url.rstrip('/')}/{TOKENIZER}"
        text = _content(file)
        if text is None:
            raise DataError(
                f"{file}: no such file; name a tokenizer.json, or make one with `unlabeled shards tokenizer`"
            )
        return cls.parse(text, _content(f"{file.rpartition('/')[0] or '.'}/{CONFIG}") or "", file)

    @classmethod
    def parse(cls, text: str, config: str = "", source: str = TOKENIZER) -> Vocabulary:
        """From the content of tokenizer.json and, where there is one, tokenizer_config.json."""
        try:
            content = json.loads(text)
            ids = _ids(content)
            named = json.loads(config) if config else {}
            size = max(ids.values()) + 1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source}: is no tokenizer.json ({error!r}); name one of the `tokenizers` library"
            ) from None
        roles = {}
        for role, names in ROLES.items():
            own = named.get(f"{role}_token")
            own = own.get("content") if isinstance(own, dict) else own
            roles[role] = next((ids[name] for name in ((own,) if own else names) if name in ids), None)
        found = {int(match[1]): number for name, number in ids.items() if (match := SENTINEL.match(name))}
        return cls(
            size, **roles, sentinels=tuple(found[n] for n in sorted(found)), source=source, text=text, config=config
        )

    @classmethod
    def standing_in(cls, size: int) -> Vocabulary:
        """One without a tokenizer, for what has to know shapes before there are data."""
        sentinels = tuple(range(size - 1, max(4, size - 101), -1))
        return cls(size, bos=0, eos=0, pad=1, mask=2, sentinels=sentinels, source="no tokenizer")

    @cached_property
    def hash(self) -> str:
        """Of what decides how text becomes numbers, in whichever order and with whichever spaces the file was written."""
        content = json.loads(self.text)
        content.pop("truncation", None)
        content.pop("padding", None)
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    @cached_property
    def special(self) -> np.ndarray:
        """bool [size]: tokens that stand for no text."""
        out = np.zeros(self.size, bool)
        out[[n for n in (self.bos, self.eos, self.pad, self.mask, *self.sentinels) if n is not None]] = True
        for token in json.loads(self.text or "{}").get("added_tokens") or []:
            out[token["id"]] |= bool(token.get("special"))
        return out

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [size]: how many bytes of UTF-8 each token stands for, special ones none. Exact for byte-level tokenizers, so DataError for others."""
        content = json.loads(self.text)
        if not is_byte_level(content):
            raise DataError(
                f"{self.source}: is not byte-level, so its tokens stand for no exact number of bytes; documents have theirs"
            )
        out = np.zeros(self.size, np.int32)
        for token, number in content["model"]["vocab"].items():
            out[number] = len(token)  # a character for each byte
        for token in content.get("added_tokens") or []:
            out[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
        return out

    def tokenizer(self) -> Any:
        """The tokenizer itself. Text that spells a special token is encoded like any other text. Raises DataError."""
        tokenizer = open_tokenizer(self.text, self.source)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer


def need_tokenizers() -> Any:
    """The package `tokenizers`, or an error that says how to get it."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "tokenizers: the package that tokenizes is not installed; pip install 'unlabeled[text]'"
        ) from None
    return tokenizers


def open_tokenizer(text: str, source: str) -> Any:
    """The tokenizer that the content of a tokenizer.json describes. Raises DataError."""
    tokenizers = need_tokenizers()
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{source}: tokenizers {tokenizers.__version__} cannot read it ({error}); name one that it can, or update the package"
        ) from None


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether a tokenizer maps bytes one to one: byte-level pieces, and no normalizer that changes text before."""
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    level = [step for step in steps if step.get("type") == "ByteLevel"]
    if not level or content.get("normalizer") or any(step.get("add_prefix_space") for step in level):
        return False
    return content["model"].get("type") == "BPE"


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """{token: id} of all tokens."""
    held = content["model"]["vocab"]
    ids = dict(held) if isinstance(held, dict) else {token: n for n, (token, _) in enumerate(held)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _content(url: str) -> str | None:
    """A small text file; None where there is none."""
    fs, path = open_store(url)
    try:
        return patiently(url, lambda: fs.cat_file(path)).decode()
    except Missing:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{url}: is no text, so no tokenizer.json") from None
