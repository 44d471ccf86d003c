"""WebDataset shards: build them from a folder of images, list what they hold, read one sample.

A shard is a plain tar; the members of one sample follow each other and share the name up to the first dot: `0000007-oak.jpg`,
`0000007-oak.cls` (the label's number), `0000007-oak.json`. `tar` and `webdataset` read them.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from data_pipeline.decode import IMAGES, Damaged, decode_image
from data_pipeline.storage import DataError, find_shards, open_store
from pretrain.progress import Progress

MEMBERS = (*IMAGES, "cls", "json", "txt")  # what a sample may hold; other members are left unread
MAX_MEMBER_BYTES = 256 << 20


# ---------------------------------------------------------------- reading
@dataclass
class Shard:
    """Where one tar's samples lie: per sample its key and {extension: (offset, size)}."""

    url: str
    keys: list[str] = field(default_factory=list)
    members: list[dict[str, tuple[int, int]]] = field(default_factory=list)


def scan(url: str) -> Shard:
    """One pass over a tar's headers. An error where the file is no tar or ends too early."""
    fs, path = open_store(url)
    shard = Shard(url)
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if (extension := extension.lower()) not in MEMBERS:
                    continue
                key = folder + slash + stem
                if not shard.keys or shard.keys[-1] != key:
                    shard.keys.append(key)
                    shard.members.append({})
                shard.members[-1][extension] = (member.offset_data, member.size)
            if shard.members and max(o + s for o, s in shard.members[-1].values()) > fs.size(path):
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise DataError(f"{url}: is no whole tar file ({error}); fetch or build it again, or leave it out") from None
    except OSError as error:
        raise DataError(f"{url}: cannot be read ({error.strerror or error})") from None
    return shard


def classes(url: str) -> list[str]:
    """The class names in the meta.json beside a shard; none where there is no such file."""
    fs, path = open_store(url)
    meta = path.rpartition("/")[0] + "/meta.json"
    return json.loads(fs.cat_file(meta)).get("classes", []) if fs.isfile(meta) else []


class Samples:
    """All samples of a list of shards, by number. `read` gives raw bytes; `image` a decoded image, or raises `Damaged`."""

    def __init__(self, specs: Iterable[str]):
        specs = list(specs)
        self.shards = [shard for shard in map(scan, find_shards(specs)) if shard.keys]
        self.names = ", ".join(specs)
        self.places = [(s, i) for s, shard in enumerate(self.shards) for i in range(len(shard.keys))]
        if not self.places:
            raise DataError(f"{self.names or 'data'}: no samples; the members that count end in {', '.join(MEMBERS)}")
        self._files: dict[tuple[int, int], int] = {}
        self._classes: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return len(self.places)

    def name(self, number: int) -> tuple[str, str]:
        """(shard, key) of a sample."""
        shard, i = self.places[number]
        return self.shards[shard].url, self.shards[shard].keys[i]

    def read(self, number: int, extensions: Iterable[str] = MEMBERS) -> dict[str, bytes]:
        """{extension: bytes} of a sample's members."""
        shard, i = self.places[number]
        members = self.shards[shard].members[i]
        return {e: self._range(shard, *members[e]) for e in extensions if e in members}

    def image(self, number: int):
        """The sample's image, uint8 [H, W, 3]."""
        for extension, data in self.read(number, IMAGES).items():
            return decode_image(data, extension)
        raise Damaged(f"holds no image member ({', '.join(IMAGES)})")

    def label(self, number: int) -> str:
        """The sample's label: the class name where the shards' meta.json has names, else the number in its `cls` member."""
        data = self.read(number, ("cls",)).get("cls")
        if data is None:
            shard, key = self.name(number)
            raise DataError(f"{shard}: {key} has no .cls member, so it has no label to score with")
        place = self.places[number][0]
        if place not in self._classes:
            self._classes[place] = classes(self.shards[place].url)
        names = self._classes[place]
        return names[int(data)] if names else data.decode().strip()

    def _range(self, shard: int, offset: int, size: int) -> bytes:
        if size > MAX_MEMBER_BYTES:
            raise Damaged(f"a member of {size} bytes, but {MAX_MEMBER_BYTES} are allowed")
        fs, path = open_store(self.shards[shard].url)
        if not os.path.isfile(path):
            data = fs.cat_file(path, start=offset, end=offset + size)
        else:
            key = (os.getpid(), shard)  # a file is opened anew after a fork
            if key not in self._files:
                self._files[key] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[key], size, offset)
        if len(data) != size:
            raise Damaged(f"{len(data)} of {size} bytes could be read")
        return data


# ---------------------------------------------------------------- building
def _images(source: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(source, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.lower().rpartition(".")[2] in IMAGES and not name.startswith("."):
                yield Path(folder, name)


def _check(path: Path) -> tuple[bytes, str]:
    """(the file's bytes, why it cannot be used or "")."""
    try:
        data = path.read_bytes()
        decode_image(data, path.suffix[1:])
    except OSError as error:
        return b"", error.strerror or str(error)
    except Damaged as reason:
        return b"", str(reason)
    return data, ""


def build(source: str | Path, target: str | Path, shard_mb: int = 256) -> dict:
    """Write a folder of images as shards; the first level of sub-folders gives the labels where there is one.

    Every image is decoded first; those that cannot be are left out and listed. `target` appears only when it is whole. Returns (and stores in
    target/meta.json) {"samples", "bytes", "shards", "classes", "bad": [{"path", "reason"}]}.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise DataError(f"{source}: {'is a file, not a folder of images' if source.exists() else 'no such folder'}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists already; name another folder, or delete it to build again")
    paths = list(_images(source))
    if not paths:
        raise DataError(f"{source}: holds no images; files that count end in {', '.join(IMAGES)}")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta = _write(source, paths, partial, shard_mb)
        if not meta["samples"]:
            worst = meta["bad"][0]
            raise DataError(
                f"{source}: none of its {len(paths)} images can be read; {worst['path']}: {worst['reason']}"
            )
        (partial / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _write(source: Path, paths: list[Path], target: Path, shard_mb: int) -> dict:
    from webdataset import ShardWriter  # imports torch: not before it is needed

    folders = sorted({path.relative_to(source).parts[0] for path in paths if len(path.relative_to(source).parts) > 1})
    labels = {name: i for i, name in enumerate(folders)}
    meta: dict = {"samples": 0, "bytes": 0, "shards": 0, "classes": folders, "bad": []}
    progress = Progress("shards", len(paths))
    with (
        ThreadPool(os.cpu_count()) as pool,
        ShardWriter(str(target / "%06d.tar"), 1_000_000, shard_mb << 20, verbose=0) as writer,
    ):
        results = (r for i in range(0, len(paths), 256) for r in pool.map(_check, paths[i : i + 256]))  # bounded memory
        for n, (path, (data, reason)) in enumerate(zip(paths, results, strict=True)):
            relative = path.relative_to(source)
            progress.update(n + 1, f"{len(meta['bad'])} bad")
            if reason:
                meta["bad"].append({"path": str(relative), "reason": reason})
                continue
            sample: dict[str, Any] = {
                "__key__": f"{n:07d}-{path.stem.replace('.', '_')}",
                path.suffix[1:].lower(): data,
            }
            sample["json"] = {"path": str(relative)}
            if len(relative.parts) > 1:
                sample["cls"] = labels[relative.parts[0]]
            writer.write(sample)
            meta["samples"] += 1
            meta["bytes"] += len(data)
    progress.close()
    meta["shards"] = len(list(target.glob("*.tar")))
    return meta
