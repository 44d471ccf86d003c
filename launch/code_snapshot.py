"""Copy the code for a job, so that edits of the checkout do not change a job that waits in the queue."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from common.errors import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "data_pipeline", "pretrain", "eval", "launch")
SUFFIXES = (".py", ".yaml")  # of the files that are copied


def files() -> list[Path]:
    """The files of the packages, relative to ROOT."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES)
    return sorted(path.relative_to(ROOT) for path in found)


def code_hash() -> str:
    """A hash of the names and contents of all files of the packages."""
    digest = hashlib.sha256()
    for path in files():
        content = (ROOT / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def write(folder: Path) -> Path:
    """Copy the packages to FOLDER/code-HASH, unless they are there already. Returns that path."""
    target = folder / f"code-{code_hash()}"
    if target.is_dir():
        return target
    partial = folder / f".{target.name}.{uuid.uuid4().hex}.partial"
    try:
        for path in files():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, partial / path)
        os.rename(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.is_dir():  # otherwise another command has written the same code at the same time
            raise UserError(f"{target}: the code cannot be copied there ({error.strerror or error})") from None
    return target
