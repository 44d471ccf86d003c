"""Splits a shard set into train, val and test by a hash of each sample's key, so that a sample stays in its split when
others are added.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import output
from common.errors import DataError
from data_pipeline.build.build_folder import normalized
from data_pipeline.build.build_shards import build
from data_pipeline.build.sources.source import Options
from data_pipeline.shards.manifest import load_manifest


def sides(val: float, test: float) -> dict[str, tuple[float, float]]:
    """{split: range [low, high) of the hash}. val takes the lowest hashes and test the highest, so that a split that
    grows takes samples from train only.
    """
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
    say: Callable[[str], None] = output.say,
) -> dict[str, dict[str, Any]]:
    """Copy the shards of a folder or URL to target/train, target/val and, with `test` above 0, target/test, each a
    shard set with its own index.

    Keys and members do not change. A key always goes to the same split, whatever else the set holds. Returns {split:
    summary of `build`}. A stopped call can be repeated: finished splits are kept, the others are resumed.
    """
    manifest = load_manifest(normalized(str(source)))
    if manifest is not None and "tokens" in manifest.details:
        raise DataError(
            f"{source}: holds tokens, whose documents continue from sample to sample; split the text shards,"
            f" then tokenize each side with --tokenizer {source}/tokenizer.json"
        )
    out = {}
    for side, (low, high) in sides(val, test).items():
        place = f"{normalized(str(target))}/{side}"
        options = Options(low=low, high=high)
        out[side] = build(source, place, shard_mb, kind="part", options=options, workers=workers, say=say)
    return out
