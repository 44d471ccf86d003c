"""Files by URL: a local path, or any store that fsspec knows (s3://, gs://, az://, https://, …).

Credentials are read from the places that the tools of each store use (AWS_*, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS,
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

FOLDER_SHARDS = (
    "folder-shards"  # sub-folder of the cache for shards made from folders of images (build/folder_cache.py)
)
# scheme of a URL -> the extra of this package that installs what reads it
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


# Endings of files that are not tars, although they may be named where shards are expected.
OTHER_FILES = tuple(f".{e}" for e in (*IMAGES, "npy", "txt", "json", "jsonl", "csv", "tsv", "parquet", "mp4", "bin"))


def open_store(url: str) -> tuple[Any, str]:
    """(fsspec filesystem, path in it) of a URL.

    Raises DataError for a URL that holds a password or a signature: it would be stored in manifests and runs.
    """
    if reason := output.secrets_error(url):
        raise DataError(f"{url}: {reason}")
    scheme = url.partition("://")[0]
    options = _login(url) if scheme in ("http", "https") else STORE_OPTIONS.get(scheme, {})
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = PACKAGE_EXTRAS.get(scheme)
        advice = f"pip install 'unlabeled[{extra}]'" if extra else str(error)
        raise DataError(f"{url}: the package that reads it is not installed; {advice}") from None
    except ValueError as error:
        raise DataError(f"{url}: cannot be opened ({error})") from None


# time limits of one request in seconds; `with_retries` of ranges.py repeats it
STORE_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "max_pool_connections": 64}},
}


def _login(url: str) -> dict[str, Any]:
    """The login that ~/.netrc (or $NETRC) has for the host of the URL, as an option of fsspec; {} if it has none."""
    try:
        entry = netrc.netrc(os.environ.get("NETRC") or None).authenticators(urlsplit(url).hostname or "")
    except FileNotFoundError:
        return {}
    except (netrc.NetrcParseError, OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise DataError(f"{url}: the netrc file, which holds its password, cannot be read: {error}") from None
    if entry is None or entry[0] == "anonymous":
        return {}
    login = base64.b64encode(f"{entry[0]}:{entry[2] or ''}".encode()).decode()
    return {"client_kwargs": {"headers": {"Authorization": f"Basic {login}"}}}


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def stamp(url: str) -> str:
    """The size and version (etag or modification time) of a file as text, which changes when the content changes."""
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
    """The folder $UNLABELED_CACHE/NAME, or ~/.cache/unlabeled/NAME, for files that can be made again if they are lost.
    Creates it if it does not exist."""
    root = os.environ.get("UNLABELED_CACHE")
    try:
        folder = Path(root or Path.home() / ".cache" / "unlabeled", name)
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError:
        raise DataError(
            "the home folder is not known; set UNLABELED_CACHE=FOLDER, the folder for cached files"
        ) from None
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be made ({error.strerror}); set UNLABELED_CACHE=FOLDER") from None
    return folder


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Only one process at a time can be in this context: it locks the file `path`, and the others wait. Has no effect
    on a file system without locks."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def write_atomically(url: str, parts: Iterable[bytes]) -> None:
    """Write a file whose name exists only once the file is complete."""
    fs, path = open_store(url)
    try:
        if not is_local(url):  # an object of a store appears when its upload is complete
            with fs.open(path, "wb") as file:
                for part in parts:
                    file.write(part)
            return
        temporary = Path(f"{path}.{os.getpid()}-{threading.get_ident()}.partial")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # it would keep a full disk full
            raise
    except OSError as error:
        raise DataError(f"{url}: cannot be written ({error.strerror or error})") from None


UNPACK_TOOLS = {
    ".tgz": "gunzip",
    ".tar.gz": "gunzip",
    ".tar.zst": "zstd -d",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
}


def compressed_tar_hint(path: str) -> str:
    """How to unpack a compressed tar, as the end of an error message; "" for other files."""
    for ending, tool in UNPACK_TOOLS.items():
        if path.lower().endswith(ending):
            return f"; samples of a compressed tar cannot be read by range: unpack it first, `{tool} {path}`"
    return ""


def find_shards(specs: Iterable[str]) -> list[str]:
    """The tar files in the given folders, globs and file names, in this order and without repetition.

    Raises DataError for a spec that gives none.
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
                raise DataError(f"{spec}: is a compressed tar{hint}")
        else:
            raise DataError(f"{spec}: no such file or folder{_missing_cache_hint(path)}")
        if other := next((file for file in found if file.lower().endswith(OTHER_FILES)), None):
            raise DataError(
                f"{spec}: {other.rpartition('/')[2]} is no tar; name tars, or a folder of shards or of images;"
                " `unlabeled shards build` makes shards of other files"
            )
        out |= dict.fromkeys(fs.unstrip_protocol(f) if "://" in spec else f for f in found)
    return list(out)


def _describe_contents(fs: Any, path: str) -> str:
    """What a folder without shards holds and what to do, as the end of an error message."""
    files = [f for f in fs.find(path) if not f.rsplit("/", 1)[-1].startswith(".")]
    if not files:
        return "is an empty folder"
    for f in files:
        if f.endswith(".tar"):
            return f"holds shards only in sub-folders; name those, for example {f.rsplit('/', 1)[0]}"
        endings = {"images": IMAGES, "arrays": ("npy",), "text": ("txt", "jsonl", "parquet")}
        what = next((name for name, known in endings.items() if f.lower().rpartition(".")[2] in known), None)
        if what and "." in f:
            return (
                f"holds {what} but no shards; make them with `unlabeled shards build"
                f" {path} {path.rstrip('/')}-shards` and name that folder"
            )
    others = Counter(f".{f.rpartition('.')[2]}" if "." in f.rpartition("/")[2] else "no extension" for f in files)
    listed = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
    return f"holds neither shards (.tar) nor images, but {listed}{compressed_tar_hint(files[0])}"


def _missing_cache_hint(path: str) -> str:
    """What to do when the shards of a folder of images are not in the cache, as the end of an error message; "" for
    other paths."""
    if Path(path).parent.name != FOLDER_SHARDS:
        return ""
    return (
        "; shards that were made from a folder of images are in the cache of the machine that built them: write"
        " data.train=FOLDER again, which builds the same shards from the same files, or build them with `unlabeled"
        " shards build` in a folder that every machine can read"
    )
