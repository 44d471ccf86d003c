"""Helpers for the tests of builds: a build in this process, and its samples as webdataset and tarfile read them."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import webdataset

from data_pipeline.build.build_shards import build
from data_pipeline.build.sources import Options


def quiet(_: str) -> None:
    pass


def make(
    source: Path | str, target: Path | str, shard_mb: float = 256, kind: str = "", workers: int = 1, **options: Any
) -> dict:
    return build(source, target, shard_mb, kind=kind, options=Options(**options), workers=workers, say=quiet)


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """The samples as webdataset reads them. Asserts that tarfile reads the same members."""
    tars = sorted(map(str, folder.glob("*.tar")))
    read = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    members = {}
    for name in tars:
        with tarfile.open(name) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                members[member.name] = tar.extractfile(member).read()
    ours = {f"{s['__key__']}.{k}": v for s in read for k, v in s.items() if not k.startswith("__")}
    assert ours == members and len({s["__key__"] for s in read}) == len(read)
    return read


def reasons(summary: dict) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in summary["bad"]}
