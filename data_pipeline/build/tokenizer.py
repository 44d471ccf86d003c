"""Train a byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909; bytes as in GPT-2) on text shards, with the
`tokenizers` library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from common import output
from common.errors import Damaged, DataError
from data_pipeline.build.stats import spread_over
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.vocabulary import CONFIG, SENTINEL, TOKENIZER, Vocabulary, need_tokenizers, with_template
from data_pipeline.storage.urls import open_store, write_atomically

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>")
SENTINELS = tuple(f"<extra_id_{n}>" for n in range(100))  # those of T5; `--specials sentinels` adds all of them
MAX_TRAINING_BYTES = 256 << 20  # bytes of text that a tokenizer is trained on
MAX_RUNS = 4096  # runs of consecutive documents that are read from a larger set
MAX_DOCUMENT_CHARACTERS = 1 << 20  # the rest of a longer document is not used, so that it does not dominate


def train(
    source: str | Sequence[str],
    target: str | Path,
    size: int = 4096,
    specials: Sequence[str] = (),
    limit: int = MAX_TRAINING_BYTES,
    say: Callable[[str], None] = output.say,
) -> Vocabulary:
    """Train a byte-level BPE of `size` tokens on text shards, and write it to `target`. Of a larger set, `limit` bytes
    are used, spread over the whole set.

    `specials`: special tokens in addition to SPECIALS; "sentinels" adds the hundred of T5. The same shards give the
    same file. `target`: a name that ends in .json, or a folder, which gets tokenizer.json and
    tokenizer_config.json.
    """
    added = [token for name in specials for token in (SENTINELS if name == "sentinels" else [name])]
    names = list(dict.fromkeys([*SPECIALS, *added]))
    smallest = 256 + len(names)
    if not smallest <= size <= 1 << 24:
        raise DataError(f"--vocab {size}: write {smallest} (256 bytes and {len(names)} special tokens) to {1 << 24}")
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
    vocabulary = Vocabulary.parse(with_template(text, Vocabulary.parse(text).bos))
    if vocabulary.size < size:
        say(
            f"{samples.names}: the tokenizer has only {vocabulary.size} tokens, because the text is not enough for more"
        )
    if str(target).endswith(".json"):
        write_atomically(str(target), [vocabulary.text.encode()])
    else:
        write_folder(str(target), vocabulary)
    return vocabulary


def check_new(target: str) -> None:
    """Raises DataError if `target`, as for `train`, is there already: token sets may have been made with it."""
    fs, path = open_store(target if target.endswith(".json") else f"{target.rstrip('/')}/{TOKENIZER}")
    if fs.exists(path):
        raise DataError(f"{path}: exists already; name another file or folder, or delete it")


def texts(samples: Samples, limit: int = MAX_TRAINING_BYTES) -> Iterator[str]:
    """At most `limit` bytes of the documents: all documents, or runs of consecutive ones that are spread evenly.

    Damaged documents are skipped.
    """
    if "txt" not in samples.extensions:
        present = ", ".join(f".{e}" for e in samples.extensions)
        raise DataError(f"{samples.names}: holds {present} and no .txt; make text shards with `unlabeled shards build`")
    all_fit = samples.total_bytes <= limit
    starts = [0] if all_fit else spread_over(len(samples), MAX_RUNS)
    share = limit // len(starts)
    for start, end in zip(starts, [*starts[1:], len(samples)], strict=True):
        taken, number = 0, start
        while number < end and taken < share:
            text = document(samples, number)
            number += 1
            if text:
                taken += len(text.encode())
                yield text[:MAX_DOCUMENT_CHARACTERS]


def document(samples: Samples, number: int) -> str:
    """The text of a sample; "" if it is damaged or not UTF-8."""
    try:
        return samples.read(number, ("txt",)).get("txt", b"").decode()
    except (Damaged, UnicodeDecodeError):
        return ""


def write_folder(folder: str, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that `transformers.AutoTokenizer` opens the folder. Existing
    files are replaced."""
    config = json.loads(vocabulary.config) if vocabulary.config else _config(vocabulary)
    write_atomically(f"{folder}/{TOKENIZER}", [vocabulary.text.encode()])
    write_atomically(f"{folder}/{CONFIG}", [(json.dumps(config, indent=1) + "\n").encode()])


def _config(vocabulary: Vocabulary) -> dict[str, object]:
    """The content of tokenizer_config.json for a tokenizer that has none."""
    added = {token["id"]: token["content"] for token in json.loads(vocabulary.text).get("added_tokens") or []}
    roles = {role: getattr(vocabulary, role) for role in ("bos", "eos", "pad", "mask")}
    out: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    out |= {f"{role}_token": added[number] for role, number in roles.items() if number in added}
    sentinels = [name for name in added.values() if SENTINEL.match(name)]
    return out | ({"additional_special_tokens": sentinels} if sentinels else {})


def smallest_dtype(size: int) -> np.dtype:
    """The smallest dtype for the tokens of a vocabulary of `size` tokens."""
    return np.dtype("<u2" if size <= 1 << 16 else "<u4")
