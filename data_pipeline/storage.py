"""Files by URL, wherever they are: a path, or any store that fsspec knows (s3://, gs://, az://, https://, …).

Credentials come from where each store's own tools look for them (AWS_*, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_*): never from a recipe.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from data_pipeline.decode import IMAGES
from pretrain.errors import UserError


class DataError(UserError):
    """Data that is not there, or is not what it should be."""


EXTRA = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "http": "http", "https": "http"}


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, the path inside it)."""
    try:
        return fsspec.core.url_to_fs(url, **OPTIONS.get(url.partition("://")[0], {}))
    except ImportError as error:
        extra = EXTRA.get(url.partition("://")[0])
        todo = f"pip install 'unlabeled[{extra}]'" if extra else str(error)
        raise DataError(f"{url}: the package that reads it is not installed; {todo}") from None
    except ValueError as error:
        raise DataError(f"{url}: no way to open it ({error})") from None


# time-outs of one request, in seconds; the retries around it are ours (fetch.py)
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 64}},
}


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def stamp(url: str) -> str:
    """Size and version (etag, or time of change) of a file: another stamp, other bytes."""
    fs, path = open_store(url)
    try:
        about = fs.info(path)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror or error})") from None
    version = about.get("ETag") or about.get("etag") or about.get("mtime") or about.get("LastModified") or ""
    return f"{about.get('size')} {version}"


def cache_folder(name: str) -> Path:
    """A folder for what can be made again: $UNLABELED_CACHE/NAME, or ~/.cache/unlabeled/NAME."""
    folder = Path(os.environ.get("UNLABELED_CACHE") or Path.home() / ".cache" / "unlabeled", name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(url: str, parts: Iterable[bytes]) -> None:
    """Write a file that appears under its name only when it is whole."""
    fs, path = open_store(url)
    try:
        if not is_local(url):  # an object appears when its upload ends
            with fs.open(path, "wb") as file:
                for part in parts:
                    file.write(part)
            return
        temporary = Path(f"{path}.{os.getpid()}-{threading.get_ident()}.partial")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{url}: cannot be written ({error.strerror or error})") from None


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
        held = "images" if f.lower().endswith(tuple("." + ending for ending in IMAGES)) else "text"
        if held == "images" or f.lower().endswith((".txt", ".jsonl", ".parquet")):
            return f"holds {held} but no shards; make them with `unlabeled shards build {path} {path.rstrip('/')}-shards` and name that folder"
    return "is a folder without .tar shards"
