"""Text from an exported model, token by token with a key-value cache: `unlabeled generate FOLDER "Once upon a time"`.

`tokens` is the sampler, for a decoder or a T5; `text` adds the folder's tokenizer and yields pieces of text as soon as they are whole characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.vocabulary import open_tokenizer
from pretrain import weights
from pretrain.errors import UserError
from pretrain.layouts.tokenizer import specials
from pretrain.models import presets
from pretrain.models.text_layers import Cache, TextBackbone

PENDING = 4  # bytes of the longest character in UTF-8: what is no character after so many tokens never becomes one


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to the `top_k` likeliest, then to the smallest set that has `top_p`."""

    tokens: int = 200  # at most
    temperature: float = 0.8  # 0: always the likeliest
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
        for name, value, fine, wanted in checks:
            if not fine:
                raise UserError(f"--{name} {value}: must be {wanted}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from logits [V]."""
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
    """Tokens that go on from a prompt, up to one of `stop`, `sampling.tokens`, or the end of a decoder's context.

    `vocabulary`: how many of the logits stand for tokens; `start`: what a T5's decoder begins with.
    """
    if isinstance(model.cfg, presets.TextEncoder):
        raise UserError("a BERT fills in masked tokens and cannot write text; name a decoder or a T5")
    device = next(model.parameters()).device
    generator, ends = torch.Generator().manual_seed(sampling.seed), set(stop)
    given, limit = torch.tensor([prompt], device=device), sampling.tokens
    memory = None
    if isinstance(model.cfg, presets.EncoderDecoder):
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


def text(folder: str | Path, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Pieces of the text that a folder's model writes, each of whole characters. Raises UserError for a folder that cannot."""
    folder = Path(folder)
    model, _ = weights.load_backbone(folder)
    if not isinstance(model, TextBackbone):
        raise UserError(f"{folder}: holds a {type(model).__name__}, which does not write text")
    tokenizer, fields = _tokenizer(folder), json.loads((folder / "config.json").read_text())
    known = specials(folder / "tokenizer.json")
    ends = fields.get("eos_token_id", known["eos"][1] if "eos" in known else None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    begin = fields.get("bos_token_id")
    ids = tokenizer.encode(prompt).ids or ([begin] if begin is not None else ends[:1])
    if not ids or max(ids) >= model.vocab_size:
        raise UserError(f"{folder}: its tokenizer has no token for an empty prompt, or more tokens than the model")
    if isinstance(model.cfg, presets.EncoderDecoder) and ids[-1] not in ends:
        ids = [*ids, *ends[:1]]  # as what its encoder read in training
    start = fields.get("decoder_start_token_id") or 0
    made = tokens(model, ids, sampling, ends, tokenizer.get_vocab_size(), start)
    yield from characters(tokenizer, made, [] if isinstance(model.cfg, presets.EncoderDecoder) else ids[-1:])


def characters(tokenizer: Any, made: Iterable[int], after: Iterable[int] = ()) -> Iterator[str]:
    """Text of tokens that stand behind the token `after`, held back while its last character is not whole."""
    held = list(
        after
    )  # the last token that was shown, as some tokenizers drop a space at the beginning, and those that wait
    shown = len(held)
    for token in made:
        held.append(token)
        before, now = (tokenizer.decode(part, skip_special_tokens=False) for part in (held[:shown], held))
        if now.endswith("\ufffd") and len(held) - shown < PENDING:
            continue
        yield now[len(before) :]
        held, shown = held[-1:], 1
    if len(held) > shown:
        before, now = (tokenizer.decode(part, skip_special_tokens=False) for part in (held[:shown], held))
        yield now[len(before) :]


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; put the one of its training data there")
    return open_tokenizer(path.read_text(), str(path))
