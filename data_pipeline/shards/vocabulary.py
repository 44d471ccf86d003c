"""The content of a tokenizer.json, read without the `tokenizers` package: the number of tokens, the special tokens, and
the bytes of each token.

A token set includes its tokenizer.json, of which training needs only `Vocabulary.read`. The roles of special tokens
(BOS, EOS, …) follow from their usual names, or from a tokenizer_config.json beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common.errors import DataError
from common.untrusted import loads, schema_error
from data_pipeline.storage.ranges import MissingFile, with_retries
from data_pipeline.storage.urls import is_local, open_store

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTINEL = re.compile(r"^<\|?extra_id_(\d{1,9})\|?>$")
# The usual names of the special token of each role. The first name that a tokenizer has is the token of the role.
ROLES = {
    "bos": ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos": ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "mask": ("<|mask|>", "<mask>", "[MASK]"),
}
# A byte-level vocabulary writes these bytes as the character with the same number, and all others as the characters
# from 256 on.
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_CHARACTERS = frozenset(map(chr, [*_PRINTED, *range(256, 512 - len(_PRINTED))]))
TEMPLATES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")  # post-processors that add special tokens


MAX_TOKENS = 1 << 24  # the largest vocabulary that is read
# What `schema_error` checks: tokenizer.json, and tokenizer_config.json.
_STEPS_SCHEMA = ({"?type": str, "?pretokenizers": [{"?type": str}]}, None)
_ADDED_TOKENS_SCHEMA = ([{"id": int, "content": str}], None)
_SCHEMA = {
    "model": {"vocab": ({...: int}, [[(str, float)]]), "?type": str},
    "?added_tokens": _ADDED_TOKENS_SCHEMA,
    "?post_processor": ({"?type": str, "?processors": [{"?type": str}]}, None),
    "?pre_tokenizer": _STEPS_SCHEMA,
}
_CONFIG_SCHEMA = {f"?{role}_token": (str, {"content": str}, None) for role in ROLES}  # of tokenizer_config.json


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer. `size` is the highest id + 1. A role that no token has is None.

    `unk` represents text that the model cannot encode. `sentinels` are those of T5, <extra_id_0> first.
    """

    size: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    mask: int | None = None
    unk: int | None = None
    sentinels: tuple[int, ...] = ()
    source: str = ""  # the file that it was read from, for errors
    text: str = field(default="", repr=False, compare=False)  # the content of tokenizer.json
    config: str = field(default="", repr=False, compare=False)  # the content of tokenizer_config.json, if it exists

    @classmethod
    def read(cls, url: str) -> Vocabulary:
        """Read a tokenizer.json, or a folder that holds one; local or any URL. Raises DataError."""
        file = url if url.endswith(".json") else f"{url.rstrip('/')}/{TOKENIZER}"
        text = _read_text(file)
        if text is None:
            raise DataError(
                f"{file}: no such file; name a tokenizer.json, or make one with `unlabeled shards tokenizer`"
            )
        return cls.parse(text, _read_text(f"{file.rpartition('/')[0] or '.'}/{CONFIG}") or "", file)

    @classmethod
    def parse(cls, text: str, config: str = "", source: str = TOKENIZER) -> Vocabulary:
        """The vocabulary from the content of tokenizer.json and, if it exists, tokenizer_config.json.

        Raises DataError.
        """
        try:
            content, named = loads(text), loads(config or "{}")
            if "\\ud" in text.lower():  # an unpaired surrogate, which JSON can express but no text can hold
                json.dumps(content, ensure_ascii=False).encode()
            wrong = schema_error(content, _SCHEMA) or schema_error(named, _CONFIG_SCHEMA, CONFIG)
            ids = {} if wrong else _ids(content)
            size = max(ids.values(), default=-1) + 1
        except ValueError as error:
            wrong = str(error)
        if not wrong and not (ids and min(ids.values()) >= 0 and size <= MAX_TOKENS):
            wrong = (
                f"its tokens have the numbers {min(ids.values(), default=0)} to {size - 1}, but 0 to {MAX_TOKENS - 1}"
                " are read"
            )
        if wrong:
            raise DataError(f"{source}: is not a valid tokenizer.json ({wrong}); name one of the `tokenizers` library")
        roles = {}
        for role, names in ROLES.items():
            configured = named.get(f"{role}_token")
            configured = configured.get("content") if isinstance(configured, dict) else configured
            candidates = (configured,) if configured else names
            roles[role] = next((ids[name] for name in candidates if name in ids), None)
        found = {int(match[1]): number for name, number in ids.items() if (match := SENTINEL.match(name))}
        unk = content["model"].get("unk_id", ids.get(content["model"].get("unk_token") or ""))
        sentinels = tuple(found[n] for n in sorted(found))
        return cls(size, **roles, unk=unk, sentinels=sentinels, source=source, text=text, config=config)

    @classmethod
    def stand_in_for_size(cls, size: int) -> Vocabulary:
        """A vocabulary of `size` tokens without a tokenizer, for plans and tests, which need shapes but no data."""
        sentinels = tuple(range(size - 1, max(4, size - 101), -1))
        return cls(size, bos=0, eos=0, pad=1, mask=2, sentinels=sentinels, source="no tokenizer")

    @cached_property
    def hash(self) -> str:
        """A hash of everything in tokenizer.json that affects tokenization. It does not depend on the order of keys or
        on spaces in the file.

        The template that `with_template` adds is left out, because token sets and exports tokenize without special
        tokens and add their own.
        """
        content = json.loads(self.text)
        if "post_processor" in content:
            content["post_processor"] = _without_template(content["post_processor"])
        content.pop("truncation", None)
        content.pop("padding", None)
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    @property
    def joined(self) -> bool:
        """Whether BOS and EOS are the same token, so that a single token separates two documents."""
        return self.bos is not None and self.bos == self.eos

    @cached_property
    def known_characters(self) -> frozenset[str] | None:
        """The characters that the model can encode (for a byte-level model: bytes, written as characters), if it is a
        BPE model that silently drops all others. None if the model drops no characters.
        """
        content = json.loads(self.text)
        model = content["model"]
        if model.get("type") != "BPE" or model.get("unk_token") or model.get("byte_fallback"):
            return None
        prefix = model.get("continuing_subword_prefix") or ""
        names = {name.removeprefix(prefix) for name in model["vocab"]}
        known = frozenset(name for name in names if len(name) == 1)
        steps = _flattened_steps(content.get("pre_tokenizer"), "pretokenizers")
        byte_level = any(step.get("type") == "ByteLevel" for step in steps)
        return None if byte_level and known >= _BYTE_CHARACTERS else known

    def count_dropped(self, text: str, tokenizer: Any) -> int:
        """The number of characters (for a byte-level model: bytes) of a text that `tokenizer` silently drops. White
        space is not counted."""
        known = self.known_characters
        if known is None:
            return 0
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        pre_tokenizer = tokenizer.pre_tokenizer
        pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
        return sum(c not in known for piece in pieces for c in piece if not c.isspace())

    def check_unknown(self) -> None:
        """Raises DataError for a tokenizer without a token for unknown text, because it fails at such text."""
        model = json.loads(self.text)["model"]
        if model.get("type") in ("WordPiece", "WordLevel", "Unigram") and self.unk is None:
            raise DataError(
                f"{self.source}: is a {model['type']} model without a token for unknown text, so it fails at such text;"
                " name a byte-level tokenizer, or make one with `unlabeled shards tokenizer`"
            )

    @cached_property
    def special(self) -> np.ndarray:
        """bool [size]: whether each token is special, that is, does not represent text."""
        out = np.zeros(self.size, bool)
        out[[n for n in (self.bos, self.eos, self.pad, self.mask, *self.sentinels) if n is not None]] = True
        for token in json.loads(self.text or "{}").get("added_tokens") or []:
            out[token["id"]] |= bool(token.get("special"))
        return out

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [size]: the number of UTF-8 bytes that each token represents; 0 for special tokens.

        Raises DataError for tokenizers that are not byte-level.
        """
        content = json.loads(self.text)
        if not is_byte_level(content):
            raise DataError(
                f"{self.source}: is not byte-level, so the number of bytes of a token is not defined, only that of a"
                " document"
            )
        out = np.zeros(self.size, np.int32)
        for token, number in content["model"]["vocab"].items():
            out[number] = len(token)  # a character for each byte
        for token in content.get("added_tokens") or []:
            out[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
        return out

    def tokenizer(self) -> Any:
        """The tokenizer of the `tokenizers` package. A special token's name in a text is encoded like any other text.

        Raises DataError.
        """
        tokenizer = open_tokenizer(self.text, self.source)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer


def need_tokenizers() -> Any:
    """The package `tokenizers`. Raises DataError that says how to install it."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "the package tokenizers, which tokenizes text, is not installed; pip install 'unlabeled[text]'"
        ) from None
    return tokenizers


def open_tokenizer(text: str, source: str) -> Any:
    """The tokenizer of a tokenizer.json with the content `text`. Raises DataError."""
    tokenizers = need_tokenizers()
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{source}: tokenizers {tokenizers.__version__} cannot read it ({error}); name another tokenizer.json, or"
            " update the package"
        ) from None


def would_be_joined(special_tokens: Iterable[str]) -> bool:
    """Whether a tokenizer with these special tokens has the same token as BOS and EOS (see `Vocabulary.joined`)."""
    present = set(special_tokens)
    bos, eos = (next((name for name in ROLES[role] if name in present), None) for role in ("bos", "eos"))
    return bos is not None and bos == eos


def with_template(text: str, begin: int | None, end: int | None = None) -> str:
    """The tokenizer.json `text`, changed so that `encode` adds the special token `begin` before a text and `end` after
    it, as documents have them in training.

    It is returned unchanged if it adds them already, or if both are None.
    """
    content = json.loads(text)
    processor = _without_template(content.get("post_processor"))
    names = {number: name for name, number in _ids(content).items()}
    present = _template_tokens(processor)
    wanted = {"first": begin, "last": end}
    missing = {side: n for side, n in wanted.items() if n is not None and present.get(side) != n}
    if not missing:
        return text

    def special(side: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": names[missing[side]], "type_id": 0}}] if side in missing else []

    text_a, text_b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [*special("first"), text_a, *special("last")],
        "pair": [*special("first"), text_a, *special("last"), text_b, *special("last")],
        "special_tokens": {
            names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]}
            for number in missing.values()
        },
    }
    ours = {"type": "Sequence", "processors": [template]}  # `_without_template` recognises it as a sequence of one
    content["post_processor"] = ours if processor is None else {"type": "Sequence", "processors": [processor, ours]}
    return json.dumps(content, ensure_ascii=False)


def _without_template(processor: Any) -> Any:
    """A post-processor without the template that `with_template` adds."""
    steps = processor.get("processors") if isinstance(processor, dict) else None
    if steps and [step.get("type") for step in steps] == ["TemplateProcessing"]:
        return None
    if steps and len(steps) == 2 and steps[1].get("type") == "Sequence" and _without_template(steps[1]) is None:
        return steps[0]
    return processor


def _template_tokens(processor: Any) -> dict[str, int]:
    """{"first": id, "last": id} of the special tokens that a post-processor adds before and after a text."""
    out: dict[str, int] = {}
    for step in _flattened_steps(processor, "processors"):
        if step["type"] == "TemplateProcessing":
            ids = {name: token["ids"][0] for name, token in step["special_tokens"].items()}
            for side, piece in (("first", step["single"][0]), ("last", step["single"][-1])):
                if "SpecialToken" in piece:
                    out[side] = ids[piece["SpecialToken"]["id"]]
        elif step["type"] in TEMPLATES:
            out |= {"first": step["cls"][1], "last": step["sep"][1]}
    return out


def _flattened_steps(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or post-processor, with nested sequences flattened."""
    if not isinstance(step, dict):
        return []
    return [inner for part in step[key] for inner in _flattened_steps(part, key)] if key in step else [step]


def is_byte_level(content: dict[str, Any]) -> bool:
    """Whether the tokens represent exactly the bytes of a text: a byte-level BPE that does not change the text
    first."""
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if not byte_level or content.get("normalizer") or any(step.get("add_prefix_space") for step in byte_level):
        return False
    return content["model"].get("type") == "BPE"


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """{token: id} of all tokens."""
    vocab = content["model"]["vocab"]  # {token: id}, or a list of (token, score)
    ids = dict(vocab) if isinstance(vocab, dict) else {str(token): n for n, (token, *_) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _read_text(url: str) -> str | None:
    """The content of a small text file; None if it does not exist."""
    fs, path = open_store(url)
    try:
        if is_local(url):
            return Path(path).read_bytes().decode()
        return with_retries(url, lambda: fs.cat_file(path)).decode()
    except (MissingFile, FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"{url}: cannot be read ({error.strerror}); name a tokenizer.json, or a folder that holds one"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{url}: is not a text file, so it is not a tokenizer.json") from None
