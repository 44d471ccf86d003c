"""Score a frozen model: `evaluate("runs/demo/export/600", ["knn", "linear"], gallery=[…], query=[…])` gives one row per metric."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.results import Row
from pretrain import config
from pretrain.errors import UserError, nearest

PROTOCOLS = ("knn", "linear", "bits_per_byte")
TEXT = ("bits_per_byte",)  # those of language models alone; the others score features of labelled images or texts


def check(protocols: Sequence[str]) -> None:
    for name in protocols:
        if name not in PROTOCOLS:
            raise UserError(f"{name!r}: no such protocol; {nearest(name, PROTOCOLS)}")


def evaluate(
    model: str | Path,
    protocols: Sequence[str],
    gallery: Sequence[str],
    query: Sequence[str],
    split: str = "test",
    image_size: int | None = None,
    options: dict[str, dict[str, Any]] | None = None,
) -> list[Row]:
    """Rows for every metric of every protocol. `model` is an exported folder, "pixels" or "bytes"; `options` is {"knn": {"k": 20}}."""
    check([*protocols, *(options or {})])
    from eval.features import Encoder, open_encoder  # imports torch

    encoder, about = open_encoder(str(model), image_size)
    rows: list[Row] = []
    for name in protocols:
        protocol = importlib.import_module(f"eval.{name}")
        cfg = config.build(protocol.Config, (options or {}).get(name, {}), {"": "command line"}, name + ".")
        if name in TEXT and isinstance(encoder, Encoder):
            others = " or ".join(other for other in PROTOCOLS if other not in TEXT)
            raise UserError(f"{model}: reads images, which {name} does not score; choose {others}")
        start = time.perf_counter()
        scores = protocol.run(encoder, list(gallery), list(query), cfg)
        common = {
            "model": encoder.name,
            "step": about["step"],
            "protocol": name,
            "version": protocol.VERSION,
            "split": split,
        }
        data = {"gallery": list(gallery), "query": list(query), **_counts(encoder, gallery, query, scores)}
        seconds = round(time.perf_counter() - start, 2)
        rows += [
            common | {"metric": metric, "value": round(value, 6)} | data | {"seconds": seconds}
            for metric, value in scores.items()
        ]
    return rows


def _counts(encoder: Any, gallery: Sequence[str], query: Sequence[str], scores: dict[str, float]) -> dict[str, Any]:
    """How much was looked at, in what unit."""
    if "bytes" in scores:
        return {"gallery_count": 0, "count": int(scores.pop("bytes")), "left_out": 0, "unit": "bytes"}
    from eval.texts import TextEncoder

    known, asked = encoder.labelled(list(gallery)), encoder.labelled(list(query))
    left_out = known.left_out + asked.left_out
    unit = "texts" if isinstance(encoder, TextEncoder) else "images"
    return {"gallery_count": len(known.labels), "count": len(asked.labels), "left_out": left_out, "unit": unit}
