"""Generate text with an exported model, token by token, with a key-value cache: `unlabeled generate FOLDER "Once upon a
time"`.

`tokens` samples tokens from a decoder or a T5. `text` also uses the tokenizer of the folder, and yields pieces of text
as soon as their characters are complete. BOS comes before the prompt, as before documents in training; if another
library wrote the folder, its tokenizer adds the special tokens.
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

MAX_CHARACTER_BYTES = 4  # of UTF-8; a character that is incomplete after so many tokens is not valid


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled: from softmax(logits / temperature), restricted to the `top_k` most probable
    tokens, and then to the smallest set of tokens with a total probability of at least `top_p`."""

    tokens: int = 200  # largest number of tokens to generate
    temperature: float = 0.8  # 0: always the most probable token
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
        probabilities = values.softmax(0)  # in descending order
        if self.top_p is not None:
            sum_before = probabilities.cumsum(0) - probabilities
            probabilities = probabilities.where(sum_before < self.top_p, 0.0)
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def tokens(
    model: TextBackbone,
    prompt: list[int],
    sampling: Sampling,
    stop: Iterable[int] = (),
    vocabulary: int | None = None,
    start: int = 0,
) -> Iterator[int]:
    """Yield the tokens that continue a prompt: until a token in `stop` is sampled, `sampling.tokens` are generated, or
    the context of a decoder is full.

    `vocabulary`: the number of tokens of the tokenizer; the model may have more logits, which are not sampled then.
    `start`: the first token of the decoder of a T5. Raises UserError for a model that does not generate text, or a
    prompt that is too long.
    """
    if not model.cfg.writes:
        raise UserError("a BERT predicts masked tokens and cannot generate text; name a decoder or a T5")
    device = next(model.parameters()).device
    generator, ends = torch.Generator().manual_seed(sampling.seed), set(stop)
    inputs, limit = torch.tensor([prompt], device=device), sampling.tokens  # [1, T]
    memory = None
    if not model.cfg.causal:
        memory, inputs = model(inputs).tokens, torch.tensor([[start]], device=device)
    else:
        limit = min(limit, model.context - len(prompt))
        if limit < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context of the model has {model.context}; shorten the"
                " prompt"
            )
    decoder: Any = model.decoder if memory is not None else model
    cache = Cache(inputs.shape[1] + limit)
    for _ in range(limit):
        hidden = decoder(inputs, cache=cache).tokens if memory is None else decoder(inputs, memory, cache=cache)
        token = sampling.draw(model.head(hidden[0, -1])[:vocabulary].cpu(), generator)
        if token in ends:
            return
        yield token
        inputs = torch.tensor([[token]], device=device)


def text(
    folder: str | Path,
    prompt: str,
    sampling: Sampling,
    stop: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Yield the text with which the model in a folder continues a prompt, in pieces of complete characters. The text
    ends before the first of the strings `stop`.

    `folder`: an export, or a run folder, whose newest export is used. The beginning of a prompt that is too long is
    left out; `say` is called with a message then. Raises UserError for a model that does not generate text.
    """
    folder = newest(Path(folder))
    model: Any = weights.load_backbone(folder)[0]
    if model.cfg.reads != "tokens":
        raise UserError(f"{folder}: holds a {type(model).__name__}, which does not generate text")
    tokenizer, fields = _tokenizer(folder), read_fields(folder)
    special_tokens = read_special_tokens(folder / "tokenizer.json")
    ends = fields.get("eos_token_id", special_tokens["eos"][1] if "eos" in special_tokens else None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    begin = fields.get("bos_token_id")
    # In our training, BOS comes before every document, even if tokenizer.json does not add it.
    ours = "unlabeled" in fields
    ids = tokenizer.encode(prompt, add_special_tokens=not ours).ids
    if begin is not None and (ours or not ids):
        ids = [begin, *ids]
    ids = ids or ends[:1]
    if not ids or max(ids) >= model.vocab_size:
        raise UserError(f"{folder}: its tokenizer has no token for an empty prompt, or more tokens than the model")
    if not model.cfg.causal and ids[-1] not in ends:
        ids = [*ids, *ends[:1]]  # the input of the encoder ends with EOS, as in training
    elif model.cfg.causal and len(ids) >= model.context:
        kept = max(1, model.context - min(sampling.tokens, model.context // 2))
        say(
            f"the prompt has {len(ids)} tokens, but the context of the model has {model.context}: the first"
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
    """Yield pieces of text up to the first of the strings `stop`. Text that may be the beginning of such a string is
    not yielded before it is known that it is not."""
    stop = [end for end in stop if end]
    pending = ""
    for piece in pieces:
        pending += piece
        found = [position for end in stop if (position := pending.find(end)) >= 0]
        if found:
            if min(found):
                yield pending[: min(found)]
            return
        # The number of characters at the end of the text with which one of the strings begins.
        matching = max((n for end in stop for n in range(1, len(end)) if pending.endswith(end[:n])), default=0)
        safe = len(pending) - matching
        if safe:
            yield pending[:safe]
        pending = pending[safe:]
    if pending:
        yield pending


def characters(tokenizer: Any, generated: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """Yield the text of generated tokens in pieces of complete characters. `after`: the token before them, if there is
    one."""
    # The last token whose text was yielded, and the tokens after it. That token is decoded again together with them,
    # because some tokenizers drop a space at the beginning of a text.
    pending = list(after)
    yielded = len(pending)  # number of tokens in `pending` whose text was yielded

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    for token in generated:
        pending.append(token)
        text = decode(pending)
        if text.endswith("\ufffd") and len(pending) - yielded < MAX_CHARACTER_BYTES:
            continue
        yield text[len(decode(pending[:yielded])) :]
        pending, yielded = pending[-1:], 1
    if len(pending) > yielded:
        yield decode(pending)[len(decode(pending[:yielded])) :]


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of an exported folder. Raises UserError if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; copy the one of its training data to this folder")
    return open_tokenizer(Vocabulary.read(str(folder)).text, str(path))  # `Vocabulary.read` checks the file
