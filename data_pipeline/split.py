"""A shard set in parts: train, val and test by a hash of each sample's key, so that a sample stays on its side when others are added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline import index
from data_pipeline.build import build
from data_pipeline.sources.base import Options
from data_pipeline.storage import DataError
from data_pipeline.workplace import normal


def sides(val: float, test: float) -> dict[str, tuple[float, float]]:
    """{name: [low, high)} of the hash: val from below and test from above, so that a larger share keeps what the smaller one held and takes from train."""
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(
            f"--val {val} --test {test}: write shares of the samples, above 0 (--test may be 0) and below 1 in all"
        )
    out = {"train": (val, 1 - test), "val": (0.0, val)}
    return {**out, "test": (1 - test, 1.0)} if test else out


def split(
    source: str | Path,
    target: str | Path,
    val: float,
    test: float = 0.0,
    shard_mb: float = 256,
    *,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Copy the shards of a folder or URL to target/train, target/val and, with `test` above 0, target/test, each a shard set with its own index.

    Keys and members stay as they are. The same key goes to the same side whatever else the set holds. Returns the summary of each side, as
    `build` does. Can be stopped and given again: sides that are whole are kept, the others go on.
    """
    held = index.load(normal(str(source)))
    if held is not None and "tokens" in held.about:
        raise DataError(
            f"{source}: holds tokens, whose documents run on from sample to sample; split the text shards,"
            f" then tokenize each side with --tokenizer {source}/tokenizer.json"
        )
    out = {}
    for side, (low, high) in sides(val, test).items():
        place = f"{normal(str(target))}/{side}"
        options = Options(low=low, high=high)
        out[side] = build(source, place, shard_mb, kind="part", options=options, workers=workers, say=say)
    return out
