"""Files by URL, wherever they are: a path, or any store that fsspec knows (s3://, gs://, az://, https://, …)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import fsspec

from data_pipeline.decode import IMAGES
from pretrain.errors import UserError


class DataError(UserError):
    """Data that is not there, or is not what it should be."""


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, the path inside it)."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: no way to open it ({error})") from None


def find_shards(specs: Iterable[str]) -> list[str]:
    """The tar files that folders, globs and files name, in order, each once; an error for a spec that gives none."""
    out: dict[str, None] = {}
    for spec in specs:
        fs, path = open_store(spec)
        if any(c in path for c in "*?["):
            found = sorted(fs.glob(path))
            if not found:
                raise DataError(f"{spec}: matches no file")
        elif fs.isdir(path):
            found = sorted(fs.glob(path.rstrip("/") + "/*.tar"))
            if not found:
                raise DataError(f"{spec}: {_what_instead(fs, path)}")
        elif fs.isfile(path):
            found = [path]
        else:
            raise DataError(f"{spec}: no such file or folder")
        out |= dict.fromkeys(fs.unstrip_protocol(f) if "://" in spec else f for f in found)
    return list(out)


def _what_instead(fs: Any, path: str) -> str:
    files = [f for f in fs.find(path) if not f.rsplit("/", 1)[-1].startswith(".")]
    if not files:
        return "is an empty folder"
    for f in files:
        if f.endswith(".tar"):
            return f"holds shards only in sub-folders; name those, for example {f.rsplit('/', 1)[0]}"
        if f.lower().endswith(tuple("." + ending for ending in IMAGES)):
            return f"holds images but no shards; make them with `unlabeled shards build {path} {path.rstrip('/')}-shards` and name that folder"
    return "is a folder without .tar shards"
