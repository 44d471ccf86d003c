"""Helpers for the tests of token sets: text shards with documents of random prose, their token sets, and the expected
rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_pipeline.build.tokenize_text import tokenize
from data_pipeline.shards import index
from data_pipeline.shards.samples import Samples
from data_pipeline.shards.token_blocks import Blocks
from data_pipeline.shards.token_rows import Rows
from tests.data.building import quiet
from tests.tars import write_tar

WORDS = [
    "the",
    "of",
    "und",
    "Straße",
    "λόγος",
    "слово",
    "語",
    "naïve",
    "a",
    "I",
    "we",
    "it",
    "sea",
    "ship",
    "wind",
    "over",
    "under",
    "\n\n",
    "1789",
    "<|endoftext|>",
    "<mask>",
    "🐍",
    ",",
    ".",
    ";",
    "'",
    '"',
]


def prose(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[n] for n in rng.zipf(1.3, words) % len(WORDS)) + f" {seed}."


def write_texts(folder: Path, count: int = 120, shards: int = 3, longest: int = 600, seed: int = 0) -> Path:
    """Text shards of `count` documents of 1 to `longest` words; one of them is far longer than a block."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for shard in range(shards):
        samples = []
        for n in range(shard, count, shards):
            words = 9000 if n == 7 else int(np.exp(rng.uniform(0, np.log(longest))))
            samples.append((f"{n:05d}.txt", prose(1000 * seed + n, words).encode()))
        write_tar(folder / f"{shard:03d}.tar", samples)
    index.write(folder, quiet)
    return folder


def tokens_of(texts: Path, target: Path, **options) -> Path:
    tokenize(texts, target, **{"vocab": 400, "shard_mb": 0.1, "block": 4096, "workers": 1, "say": quiet, **options})
    return target


def texts_in(folder: Path) -> list[str]:
    samples = Samples([str(folder)])
    return [samples.read(n)["txt"].decode() for n in range(len(samples))]


def read(rows: Rows, number: int) -> dict[str, np.ndarray]:
    return rows.sample(number, rows.read_columns(number, [0, 1]), None)


def shards_of(folder: Path) -> list[list[np.ndarray]]:
    """The documents of each shard."""
    held = Blocks([str(folder)])
    return [[tokens for tokens, _ in held.documents(n, n + 1)] for n in range(len(held.first) - 1)]


def word_pieces(path: Path, words: str, unknown: str | None = "[UNK]") -> Path:
    """A WordPiece tokenizer that knows only the given words."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {name: n for n, name in enumerate([*names, *words.split()])}
    added = [
        {
            "id": n,
            "content": name,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for n, name in enumerate(names)
    ]
    model = {
        "type": "WordPiece",
        "unk_token": unknown or "none",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    path.write_text(
        json.dumps(
            {
                "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None, "decoder": None, "model": {**model, "vocab": vocab},
            }
        )
    )  # fmt: skip
    return path
