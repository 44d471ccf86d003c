"""A byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2) trained on text shards with the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.decode import Damaged
from data_pipeline.shards import Samples
from data_pipeline.stats import spread_over
from data_pipeline.storage import DataError, write_whole
from data_pipeline.vocabulary import CONFIG, SENTINEL, TOKENIZER, Vocabulary, need_tokenizers

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>")
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(100))  # T5's; asked for as "sentinels"
BYTES = 256 << 20  # of text that a tokenizer is trained on, at most
RUNS = 4096  # runs of neighbouring documents that these are taken from
LONGEST = 1 << 20  # characters of a document that are looked at: a longer one is one document's habits


def train(
    source: str | Sequence[str],
    target: str | Path,
    size: int = 4096,
    specials: Sequence[str] = (),
    limit: int = BYTES,
    say: Callable[[str], None] = print,
) -> Vocabulary:
    """Train a byte-level BPE of `size` tokens on text shards, or on at most `limit` bytes of them from all over, and write it as `target`.

    `specials` come after SPECIALS; "sentinels" among them stands for T5's hundred. The same shards give the same file. `target`: a name that ends
    in .json, or a folder, which gets tokenizer.json and tokenizer_config.json.
    """
    names = list(dict.fromkeys([*SPECIALS, *(s for n in specials for s in (SENTINELS if n == "sentinels" else [n]))]))
    least = 256 + len(names)
    if not least <= size <= 1 << 24:
        raise DataError(f"--vocab {size}: write {least} (256 bytes and {len(names)} special tokens) to {1 << 24}")
    tokenizers = need_tokenizers()
    samples = Samples([source] if isinstance(source, str) else list(source))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=names,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer.train_from_iterator(texts(samples, limit), trainer)
    text = tokenizer.to_str(pretty=False)
    vocabulary = Vocabulary.parse(text)
    if vocabulary.size < size:
        say(f"{samples.names}: there is text for {vocabulary.size} tokens only; so many it is")
    if str(target).endswith(".json"):
        write_whole(str(target), [text.encode()])
    else:
        write_folder(str(target), vocabulary)
    return vocabulary


def texts(samples: Samples, limit: int = BYTES) -> Iterator[str]:
    """At most `limit` bytes of the documents: all of them, or runs of neighbours from places that are spread evenly. Damaged ones are passed over."""
    if "txt" not in samples.extensions:
        held = ", ".join(f".{e}" for e in samples.extensions)
        raise DataError(f"{samples.names}: holds {held} and no .txt; make text shards with `unlabeled shards build`")
    whole = samples.total_bytes <= limit
    starts = [0] if whole else spread_over(len(samples), RUNS)
    share = limit // len(starts)
    for start, end in zip(starts, [*starts[1:], len(samples)], strict=True):
        taken, number = 0, start
        while number < end and taken < share:
            text = document(samples, number)
            number += 1
            if text:
                taken += len(text.encode())
                yield text[:LONGEST]


def document(samples: Samples, number: int) -> str:
    """The text of a sample, "" where it is damaged or no UTF-8."""
    try:
        return samples.read(number, ("txt",)).get("txt", b"").decode()
    except (Damaged, UnicodeDecodeError):
        return ""


def write_folder(folder: str, vocabulary: Vocabulary) -> None:
    """Both files of a tokenizer, so that `transformers.AutoTokenizer` opens the folder. What was there under these names is replaced."""
    config = json.loads(vocabulary.config) if vocabulary.config else _config(vocabulary)
    write_whole(f"{folder}/{TOKENIZER}", [vocabulary.text.encode()])
    write_whole(f"{folder}/{CONFIG}", [(json.dumps(config, indent=1) + "\n").encode()])


def _config(vocabulary: Vocabulary) -> dict[str, object]:
    added = {token["id"]: token["content"] for token in json.loads(vocabulary.text).get("added_tokens") or []}
    roles = {role: getattr(vocabulary, role) for role in ("bos", "eos", "pad", "mask")}
    out: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    out |= {f"{role}_token": added[number] for role, number in roles.items() if number in added}
    more = [name for name in added.values() if SENTINEL.match(name)]
    return out | ({"additional_special_tokens": more} if more else {})


def smallest(size: int) -> np.dtype:
    """The type that holds every token of a vocabulary."""
    return np.dtype("<u2" if size <= 1 << 16 else "<u4")
