"""Generates text with an exported model, token by token with a key-value cache: `unlabeled generate FOLDER "Once upon a
time"`.

`tokens` samples tokens from a decoder or a T5. `text` adds the tokenizer of the folder, and yields pieces of text as
soon as their characters are complete. The prompt comes after BOS, as documents do in training; for a folder of another
library, its tokenizer adds the special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from data_pipeline.shards.vocabulary import Vocabulary, open_tokenizer
from pretrain.interchange import weights
from pretrain.interchange.layouts.fields import read as read_fields
from pretrain.interchange.layouts.tokenizer_files import read_special_tokens
from pretrain.models.text_layers import Cache, TextBackbone
from pretrain.run_folder.export_folders import exports

MAX_CHARACTER_BYTES = 4  # of UTF-8: an incomplete character after so many tokens stays incomplete


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled: from softmax(logits / temperature), restricted to the `top_k` likeliest tokens,
    and then to the smallest set of tokens with a total probability of at least `top_p`."""

    tokens: int = 200  # largest number of tokens to generate
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None
    top_p: float | None = None  # arXiv 1904.09751
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("max-tokens", self.tokens, self.tokens >= 1, "1 or more"),
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
        ]
        for name, value, valid, range_text in checks:
            if not valid:
                raise UserError(f"--{name} {value}: must be {range_text}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Sample a token from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double() / self.temperature
        values, order = logits.sort(descending=True)
        if self.top_k is not None:
            values, order = values[: self.top_k], order[: self.top_k]
        shares = values.softmax(0)
        if self.top_p is not None:
            before = shares.cumsum(0) - shares
            shares = shares.where(before < self.top_p, 0.0)
        return int(order[torch.multinomial(shares, 1, generator=generator)])


@torch.no_grad()
def tokens(
    model: TextBackbone,
    prompt: list[int],
    sampling: Sampling,
    stop: Iterable[int] = (),
    vocabulary: int | None = None,
    start: int = 0,
) -> Iterator[int]:
    """The tokens that continue a prompt. They end before one of the tokens `stop`, after `sampling.tokens`, or at the
    end of a decoder's context.

    `vocabulary`: the number of logits that stand for tokens of the tokenizer; None: all. `start`: the token with which
    the decoder of a T5 begins. Raises UserError for a model that does not generate text, or a prompt that is too long.
    """
    if not model.cfg.writes:
        raise UserError("a BERT fills in masked tokens and cannot write text; name a decoder or a T5")
    device = next(model.parameters()).device
    generator, ends = torch.Generator().manual_seed(sampling.seed), set(stop)
    given, limit = torch.tensor([prompt], device=device), sampling.tokens
    memory = None
    if not model.cfg.causal:
        memory, given = model(given).tokens, torch.tensor([[start]], device=device)
    else:
        limit = min(limit, model.context - len(prompt))
        if limit < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and the model a context of {model.context}; shorten it"
            )
    decoder: Any = model.decoder if memory is not None else model
    cache = Cache(given.shape[1] + limit)
    for _ in range(limit):
        hidden = decoder(given, cache=cache).tokens if memory is None else decoder(given, memory, cache=cache)
        token = sampling.draw(model.head(hidden[0, -1])[:vocabulary].cpu(), generator)
        if token in ends:
            return
        yield token
        given = torch.tensor([[token]], device=device)


def text(
    folder: str | Path,
    prompt: str,
    sampling: Sampling,
    stop: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Pieces of the text with which the model of a folder continues a prompt, each of complete characters. The text
    ends before the first of the strings `stop`.

    `folder`: an export, or a run folder, whose newest export is taken. A prompt that is too long loses its beginning;
    `say` then gets a message. Raises UserError for a model that does not generate text.
    """
    folder = newest(Path(folder))
    model: Any = weights.load_backbone(folder)[0]
    if model.cfg.reads != "tokens":
        raise UserError(f"{folder}: holds a {type(model).__name__}, which does not write text")
    tokenizer, fields = _tokenizer(folder), read_fields(folder)
    special_tokens = read_special_tokens(folder / "tokenizer.json")
    ends = fields.get("eos_token_id", special_tokens["eos"][1] if "eos" in special_tokens else None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    begin = fields.get("bos_token_id")
    # In our training BOS comes before every document, even if the tokenizer's file does not add it.
    ours = "unlabeled" in fields
    ids = tokenizer.encode(prompt, add_special_tokens=not ours).ids
    if begin is not None and (ours or not ids):
        ids = [begin, *ids]
    ids = ids or ends[:1]
    if not ids or max(ids) >= model.vocab_size:
        raise UserError(f"{folder}: its tokenizer has no token for an empty prompt, or more tokens than the model")
    if not model.cfg.causal and ids[-1] not in ends:
        ids = [*ids, *ends[:1]]  # as in the input of the encoder in training
    elif model.cfg.causal and len(ids) >= model.context:
        kept = max(1, model.context - min(sampling.tokens, model.context // 2))
        say(
            f"the prompt has {len(ids)} tokens, and the model a context of {model.context}: the first"
            f" {len(ids) - kept} are left out"
        )
        ids = ids[-kept:]
    start = fields.get("decoder_start_token_id") or 0
    generated = tokens(model, ids, sampling, ends, tokenizer.get_vocab_size(), start)
    pieces = characters(tokenizer, generated, ids[-1:] if model.cfg.causal else [])
    yield from until(pieces, stop)


def newest(folder: Path) -> Path:
    """The newest export if `folder` is a run folder, otherwise `folder`."""
    if not (folder / "recipe.yaml").is_file() or (folder / "config.json").is_file():
        return folder
    found = exports(folder)
    if not found:
        raise UserError(f"{folder}: this run has no export yet; write one with `unlabeled export {folder}`")
    return found[max(found)]


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces of text before the first of the strings `stop`. Text that may be the beginning of one is held back."""
    stop = [end for end in stop if end]
    pending = ""
    for piece in pieces:
        pending += piece
        found = [at for end in stop if (at := pending.find(end)) >= 0]
        if found:
            if min(found):
                yield pending[: min(found)]
            return
        begun = max((n for end in stop for n in range(1, len(end)) if pending.endswith(end[:n])), default=0)
        if len(pending) > begun:
            yield pending[: len(pending) - begun]
        pending = pending[len(pending) - begun :]
    if pending:
        yield pending


def characters(tokenizer: Any, generated: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """The text of generated tokens, in pieces of complete characters. `after`: the token before them, if there is
    one."""
    # The last token whose text was yielded, and the tokens since then. It is decoded again with them, because some
    # tokenizers drop a space at the beginning of a text.
    pending = list(after)
    yielded = len(pending)  # number of tokens in `pending` whose text was yielded
    for token in generated:
        pending.append(token)
        before, now = (tokenizer.decode(part, skip_special_tokens=False) for part in (pending[:yielded], pending))
        if now.endswith("\ufffd") and len(pending) - yielded < MAX_CHARACTER_BYTES:
            continue
        yield now[len(before) :]
        pending, yielded = pending[-1:], 1
    if len(pending) > yielded:
        before, now = (tokenizer.decode(part, skip_special_tokens=False) for part in (pending[:yielded], pending))
        yield now[len(before) :]


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of an exported folder. Raises UserError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the one of its training data there")
    return open_tokenizer(Vocabulary.read(str(folder)).text, str(path))  # `Vocabulary.read` checks the file
