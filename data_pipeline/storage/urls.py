"""Files by URL: a local path, or any store that fsspec knows (s3://, gs://, az://, https://, …).

Credentials come from where the tools of each store look for them (AWS_*, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_*, ~/.netrc for http), never from a URL, because URLs are stored in recipes, manifests and results.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import netrc
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from common import output
from common.errors import DataError
from data_pipeline.formats.image_formats import IMAGES

FOLDER_SHARDS = "folder-shards"  # sub-folder of the cache with shards of folders of images (build/folder_cache.py)
PACKAGE_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "abfs": "az",
    "http": "http",
    "https": "http",
}


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) of a URL.

    Raises DataError for a URL that holds a password or a signature: it would be stored in manifests and runs.
    """
    if reason := output.secrets_error(url):
        raise DataError(f"{url}: {reason}")
    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(
            url, **STORE_OPTIONS.get(scheme, {}), **(_login(url) if scheme in ("http", "https") else {})
        )
    except ImportError as error:
        extra = PACKAGE_EXTRAS.get(url.partition("://")[0])
        todo = f"pip install 'unlabeled[{extra}]'" if extra else str(error)
        raise DataError(f"{url}: the package that reads it is not installed; {todo}") from None
    except ValueError as error:
        raise DataError(f"{url}: cannot be opened ({error})") from None


# time limits of one request in seconds; `with_retries` of ranges.py repeats it
STORE_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 64}},
}


def _login(url: str) -> dict[str, Any]:
    """The name and password that ~/.netrc (or $NETRC) gives for the URL's host, as an option of fsspec."""
    try:
        entry = netrc.netrc(os.environ.get("NETRC") or None).authenticators(urlsplit(url).hostname or "")
    except FileNotFoundError:
        return {}
    except (netrc.NetrcParseError, OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise DataError(f"{url}: the file with its password cannot be used: {error}") from None
    if entry is None or entry[0] == "anonymous":
        return {}
    login = base64.b64encode(f"{entry[0]}:{entry[2] or ''}".encode()).decode()
    return {"client_kwargs": {"headers": {"Authorization": f"Basic {login}"}}}


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def stamp(url: str) -> str:
    """Size and version (etag or modification time) of a file as one text, which changes when the content changes."""
    fs, path = open_store(url)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror or error})") from None
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
    return f"{info.get('size')} {version}"


def cache_folder(name: str) -> Path:
    """A folder for files that can be made again: $UNLABELED_CACHE/NAME, or ~/.cache/unlabeled/NAME."""
    root = os.environ.get("UNLABELED_CACHE")
    try:
        folder = Path(root or Path.home() / ".cache" / "unlabeled", name)
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError:
        raise DataError("no home folder is known; set UNLABELED_CACHE=FOLDER, the folder for cached files") from None
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be made ({error.strerror}); set UNLABELED_CACHE=FOLDER") from None
    return folder


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time into the context, by a lock on a file; the others wait. Has no effect on a file system
    without locks."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def write_atomically(url: str, parts: Iterable[bytes]) -> None:
    """Write a file that appears under its name only when it is complete."""
    fs, path = open_store(url)
    try:
        if not is_local(url):  # an object of a store appears when its upload is complete
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


def compressed_tar_hint(path: str) -> str:
    """How to unpack a compressed tar, as the end of an error message; "" for other files."""
    if not path.lower().endswith((".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        return ""
    tool = (
        "zstd -d"
        if path.endswith(".zst")
        else "bunzip2"
        if path.endswith("2")
        else "unxz"
        if path.endswith("xz")
        else "gunzip"
    )
    return f"; samples of a compressed tar cannot be read by range: unpack it first, `{tool} {path}`"


def find_shards(specs: Iterable[str]) -> list[str]:
    """The tar files that folders, globs and file names stand for, in order and each once.

    Raises DataError for a spec without any.
    """
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
                raise DataError(f"{spec}: {_describe_contents(fs, path)}")
        elif fs.isfile(path):
            found = [path]
            if hint := compressed_tar_hint(spec):
                raise DataError(f"{spec}: is no tar that can be read{hint}")
        else:
            raise DataError(f"{spec}: no such file or folder{_missing_cache_hint(path)}")
        out |= dict.fromkeys(fs.unstrip_protocol(f) if "://" in spec else f for f in found)
    return list(out)


def _describe_contents(fs: Any, path: str) -> str:
    """What a folder without shards holds and what to do about it, for an error message."""
    files = [f for f in fs.find(path) if not f.rsplit("/", 1)[-1].startswith(".")]
    if not files:
        return "is an empty folder"
    for f in files:
        if f.endswith(".tar"):
            return f"holds shards only in sub-folders; name those, for example {f.rsplit('/', 1)[0]}"
        kind = "images" if f.lower().endswith(tuple("." + ending for ending in IMAGES)) else "text"
        if kind == "images" or f.lower().endswith((".txt", ".jsonl", ".parquet")):
            return (
                f"holds {kind} but no shards; make them with `unlabeled shards build {path} {path.rstrip('/')}-shards`"
                " and name that folder"
            )
    endings = Counter(f".{f.rpartition('.')[2]}" if "." in f.rpartition("/")[2] else "no extension" for f in files)
    listed = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    return f"holds neither shards (.tar) nor images, but {listed}{compressed_tar_hint(files[0])}"


def _missing_cache_hint(path: str) -> str:
    """What to do when the cache lacks the shards of a folder of images, as the end of an error message; "" for other
    paths.
    """
    if Path(path).parent.name != FOLDER_SHARDS:
        return ""
    return (
        "; it held shards of a folder of images, in the cache of the machine that built them: give data.train=FOLDER"
        " again, the same"
        " files give the same shards, or build them with `unlabeled shards build` where every machine sees them"
    )
