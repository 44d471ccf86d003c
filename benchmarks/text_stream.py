"""The cost of reading rows of tokens for the trainer, compared with a memory-mapped flat file of all tokens that is
read at random positions, as in nanoGPT.

    text_stream.{split,best_fit}.T{256,1024,4096}.cpu_versus_memmap   CPU seconds per token in one process, ours / theirs

Our stream reads every row once in an epoch, from shards, with its documents, and verifies the hash of every page; the
memory map does none of this. The text is Python's standard library with a byte-level BPE of 4,096 tokens. CPU seconds
are those of one process; the two alternate, and figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from data_pipeline.build.demo_text import make
from data_pipeline.shards.token_blocks import Blocks
from data_pipeline.shards.token_rows import Packing, Rows
from data_pipeline.stream.stream import Stream

BATCH = 16


def ours(tokens: Path, length: int, packing: Packing) -> Callable[[], None]:
    """A function that reads a batch from our stream."""

    def view(sample: dict, rng: object) -> dict:
        return {"tokens": sample["tokens"], "documents": sample["documents"]}

    stream = Stream(Rows([str(tokens)], length, packing), view, BATCH, workers=0)
    return lambda: next(stream) and None


def memmap(file: Path, length: int) -> Callable[[], None]:
    """A function that reads a batch from random positions of the flat file: inputs and targets, two int64 tensors."""

    def batch() -> None:
        data = np.memmap(file, np.uint16, "r")  # opened for each batch, because otherwise its pages stay in memory
        positions = torch.randint(len(data) - length, (BATCH,)).tolist()
        torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in positions])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in positions])

    return batch


def cpu_per_token(batch: Callable[[], None], length: int, tokens: int) -> float:
    count = max(1, tokens // (BATCH * length))
    began = time.process_time()
    for _ in range(count):
        batch()
    return (time.process_time() - began) / (count * BATCH * length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="number of tokens in a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder, "text"), "stdlib", say=lambda _: None)
        train = Path(folder, "text", "train")
        flat = Path(folder, "flat.bin")
        flat.write_bytes(b"".join(tokens.tobytes() for tokens, _ in Blocks([str(train)]).documents()))
        for length in (256, 1024, 4096):
            loaders = {
                "memmap": memmap(flat, length),
                "split": ours(train, length, "split"),
                "best_fit": ours(train, length, "best_fit"),
            }
            seconds: dict[str, list[float]] = {name: [] for name in loaders}
            for read_batch in loaders.values():  # warm-up
                read_batch()
            for _ in range(args.rounds):
                for name, read_batch in loaders.items():
                    seconds[name].append(cpu_per_token(read_batch, length, args.tokens))
            for name in ("split", "best_fit"):
                ratio = median(a / b for a, b in zip(seconds[name], seconds["memmap"], strict=True))
                figure = f"text_stream.{name}.T{length}.cpu_versus_memmap"
                millions = 1e-6 / median(seconds[name])
                print(
                    json.dumps(
                        {
                            "figure": figure,
                            "value": round(ratio, 2),
                            "million_tokens_per_cpu_second": round(millions, 1),
                        }
                    )
                )


if __name__ == "__main__":
    main()
