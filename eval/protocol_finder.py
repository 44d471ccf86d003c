"""Finds protocols by name: a protocol is a file of this folder that states what its data must hold, `NEEDS = "labels"`.

Such a file also has a docstring, `VERSION`, a `Config` and `run(encoder, gallery, query, cfg)`; there is no registry.
The files are read and not imported, so that the command line can list them without torch.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from common.errors import UserError, nearest

LABELS = "labels"  # what a protocol needs that classifies labelled samples, of any kind
QUERY_LABELS = "query_labels"  # what a protocol needs that fits nothing, so that it has no gallery
QUERY_MASKS = "query_masks"  # masks, and no gallery
TOKENS = "tokens"  # what a protocol for language models needs: a token set
CLASSES = "classes"  # labels and the names of all classes, and no gallery: for a dual encoder of images and texts
CAPTIONS = "captions"  # images with captions, and no gallery: for the same
IMAGES = "images"  # images without labels, and no gallery
FOLDER = Path(__file__).parent


@functools.cache
def protocols() -> dict[str, str]:
    """{name of a protocol: what the samples must hold}, by name."""
    out = {}
    for path in sorted(FOLDER.glob("*.py")):
        if found := re.search(r'^NEEDS = "(\w+)"', path.read_text(), re.MULTILINE):
            out[path.stem] = found[1]
    return out


def needs(name: str) -> str:
    """What the samples of a protocol must hold. Raises UserError for a name that is not the name of a protocol."""
    if name not in protocols():
        raise UserError(f"{name!r}: no such protocol; {nearest(name, protocols())}")
    return protocols()[name]
