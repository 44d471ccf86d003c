"""Small real shards for tests: JPEGs of noise, and tars with given members."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int = 0, size: int = 64) -> bytes:
    """A JPEG of noise, which depends on the seed."""
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_tar(path: Path, samples: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> None:
    """A tar of (name, bytes) members."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
