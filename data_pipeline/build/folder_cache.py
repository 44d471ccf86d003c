"""Shards of a folder of plain images, for `data.train=FOLDER`: built once into the cache folder, and found there by
later runs.

The name of the shard folder follows from the absolute path of the folder and a hash of its files (names, sizes,
modification times): if a file changes, new shards are built. Earlier shards stay, because runs name them. The folder of
images itself is only read.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import output
from common.errors import DataError
from data_pipeline.build.build_shards import build
from data_pipeline.build.sources import Options
from data_pipeline.build.sources.files import Images
from data_pipeline.build.sources.source import Tree
from data_pipeline.formats.image_formats import MAX_PIXELS
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.storage.urls import FOLDER_SHARDS, cache_folder, exclusive, is_local

SHARD_BYTES_RATIO = 1.1  # roughly the largest size of shards, relative to the images


def is_image_folder(spec: str) -> bool:
    """Whether `spec` is a local folder that holds image files, also in sub-folders, and no tar files."""
    if not is_local(spec) or any(mark in spec for mark in "*?["):
        return False
    path = Path(spec.removeprefix("file://")).expanduser()
    if not path.is_dir() or next(path.glob("*.tar"), None) is not None:
        return False
    files = Tree(str(path)).files
    return any(map(Images.takes, files)) and not any(file.extension == "tar" for file in files)


def shards_of(spec: str, max_pixels: int = MAX_PIXELS, say: Callable[[str], None] = output.say) -> Path:
    """The folder of shards for a folder of images (see `is_image_folder`), built now if it does not exist. Raises
    DataError.

    `max_pixels`: of the largest image that is taken. If several processes call this at once, one builds and the others
    wait for it.
    """
    tree = Tree(spec)
    digest = hashlib.sha256(f"{max_pixels}\n".encode())
    for file in tree.files:
        digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode(errors="surrogateescape"))
    place = hashlib.sha256(os.fsencode(tree.root)).hexdigest()[:8]
    name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(tree.root).name)[:60]}-{place}"
    cache = cache_folder(FOLDER_SHARDS)
    target = cache / f"{name}-{digest.hexdigest()[:12]}"
    # without locks on the file system, `build` refuses a second process
    with exclusive(cache / f".{target.name}.lock"):
        if manifest := load_manifest(str(target)):
            counted = _summary_text(manifest.details["build"], manifest.classes)
            say(f"{tree.root}: {counted}, as shards in {target}, built before")
            return target
        if any(path.name.startswith(f"{name}-") and path.suffix != ".partial" for path in cache.iterdir()):
            say(f"{tree.root}: its files have changed, so new shards are built; earlier ones stay for their runs")
        _check_room(tree, cache)
        say(f"{tree.root}: holds images and no shards; their shards are built once, in {target}")
        summary = build(tree.root, target, kind=Images.kind, options=Options(max_pixels=max_pixels), say=say)
        say(
            f"{tree.root}: {_summary_text(summary, summary['classes'])}, as shards in {target}; `recipe.yaml` names"
            " that folder"
        )
    return target


def _summary_text(summary: dict[str, Any], classes: list[str]) -> str:
    """The number of images and labels, and what was left out, as text."""
    words = [f"{summary['samples']:,} images"]
    if classes:
        words.append(f"{len(classes)} labels from its sub-folders")
    bad = summary["bad"] if isinstance(summary["bad"], int) else len(summary["bad"])
    if bad:
        words.append(f"{bad:,} damaged or too large, left out and named in bad.jsonl there")
    if unread := summary["unread"]:
        named = ", ".join(f"{n:,} {end if end == 'no extension' else f'.{end}'}" for end, n in unread.items())
        words.append(f"files that are no images, passed over: {named}")
    return "; ".join(words)


def _check_room(tree: Tree, cache: Path) -> None:
    """Raises DataError if the disk of the cache has too little free space for the shards."""
    need = SHARD_BYTES_RATIO * sum(file.size for file in tree.files if Images.takes(file))
    free = shutil.disk_usage(cache).free
    if need > free:
        raise DataError(
            f"{tree.root}: its shards take about {need / 1e9:.1f} GB, and {cache} has room for {free / 1e9:.1f} GB;"
            " set UNLABELED_CACHE=FOLDER, on a larger disk"
        )
