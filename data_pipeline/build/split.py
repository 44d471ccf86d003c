"""Split a shard set into train, val and test by a hash of each sample's key, so that a sample stays in its split when
other samples are added.
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


def hash_ranges(val: float, test: float) -> dict[str, tuple[float, float]]:
    """{split: range [low, high) of the hash}. val has the lowest hashes and test the highest, so that a larger share of
    one takes samples from train only."""
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(
            f"--val {val} --test {test}: write shares of the samples, above 0 (--test may be 0), whose sum is below 1"
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

    Keys and members do not change. A key always goes to the same split, whatever other samples the set holds. Returns
    {split: summary of `build`}. A stopped call can be repeated: finished splits are kept, the others are resumed.
    """
    manifest = load_manifest(normalized(str(source)))
    if manifest is not None and "tokens" in manifest.details:
        raise DataError(
            f"{source}: holds tokens, whose documents continue from sample to sample; split the text shards,"
            f" then tokenize each split with --tokenizer {source}/tokenizer.json"
        )
    out = {}
    for name, (low, high) in hash_ranges(val, test).items():
        folder = f"{normalized(str(target))}/{name}"
        options = Options(low=low, high=high)
        out[name] = build(source, folder, shard_mb, kind="part", options=options, workers=workers, say=say)
    return out
