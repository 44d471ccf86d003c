"""Shards of a folder of plain images, for `data.train=FOLDER`. They are built once into the cache folder, where later
runs find them.

The name of the shard folder depends on the absolute path of the folder of images and on its files (names, sizes,
modification times): if a file changes, new shards are built. Earlier shards are not deleted, because recipes of runs
name them. The folder of images is only read.
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
from data_pipeline.build.sources.media_folders import Images
from data_pipeline.build.sources.source_files import Tree
from data_pipeline.formats.image_formats import MAX_PIXELS
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.storage.urls import FOLDER_SHARDS, cache_folder, exclusive, is_local

SHARD_BYTES_RATIO = 1.1  # an upper estimate of the size of shards, relative to their images


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

    `max_pixels`: the limit for an image. If several processes call this at the same time, one builds and the others
    wait for it.
    """
    tree = Tree(spec)
    digest = hashlib.sha256(f"{max_pixels}\n".encode())
    for file in tree.files:
        digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode(errors="surrogateescape"))
    path_digest = hashlib.sha256(os.fsencode(tree.root)).hexdigest()[:8]
    name = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(tree.root).name)[:60]}-{path_digest}"
    cache = cache_folder(FOLDER_SHARDS)
    target = cache / f"{name}-{digest.hexdigest()[:12]}"
    # On a file system without locks, `build` refuses a second process.
    with exclusive(cache / f".{target.name}.lock"):
        if manifest := load_manifest(str(target)):
            contents = _summary_text(manifest.details["build"], manifest.classes)
            say(f"{tree.root}: {contents}, as shards in {target}, built before")
            return target
        if any(path.name.startswith(f"{name}-") and path.suffix != ".partial" for path in cache.iterdir()):
            say(
                f"{tree.root}: its files have changed, so new shards are built; the earlier ones stay for the runs"
                " that use them"
            )
        _check_free_space(tree, cache)
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
        words.append(f"files that are not images, ignored: {named}")
    return "; ".join(words)


def _check_free_space(tree: Tree, cache: Path) -> None:
    """Raises DataError if the disk of the cache has too little free space for the shards."""
    need = SHARD_BYTES_RATIO * sum(file.size for file in tree.files if Images.takes(file))
    free = shutil.disk_usage(cache).free
    if need > free:
        raise DataError(
            f"{tree.root}: its shards need about {need / 1e9:.1f} GB, but {cache} has {free / 1e9:.1f} GB free;"
            " set UNLABELED_CACHE=FOLDER to a folder on a larger disk"
        )
