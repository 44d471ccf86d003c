"""What an evaluation will need, before it starts: `unlabeled eval MODEL PROTOCOL… --dry-run`.

The time of an extraction is that of two batches of the true data, which are read and encoded now; the time of a protocol
follows from its operations and the speed of a matrix product on the device. A protocol states its cost by
`cost(cfg, gallery, query, dim, classes, layers)`: (bytes on the device beside the encoder, floating-point operations),
from the numbers of samples, features and classes. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import Damaged, DataError
from common.progress import duration
from data_pipeline.shards.samples import Samples
from eval import feature_cache
from eval.run import configured

LABELS_READ = 512  # labels that are read to count classes, if no manifest names them
SIDE = 1024  # of the matrices that are multiplied to measure the speed of the device


def plan(
    model: str,
    names: Sequence[str],
    gallery: Sequence[str],
    query: Sequence[str],
    image_size: int | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
) -> list[str]:
    """Lines of text: samples, time, disk and memory of the extraction, and time and memory of each protocol."""
    encoder, _, chosen = configured(model, names, image_size, options, device, cache)
    sets = {}
    for key, specs in (("gallery", gallery), ("query", query)):
        if specs:
            sets[key] = encoder.check(list(specs))
    if not sets:
        raise DataError("no shards are named; write gallery=SHARDS query=SHARDS")
    rate, width = _speed(encoder, next(iter(sets.values())))
    bytes_of_model = sum(p.numel() * p.element_size() for p in _tensors(encoder.backbone))
    out = [
        f"{encoder.name} on {encoder.device}: {bytes_of_model / 1e6:,.0f} MB of weights, {rate:,.0f} {encoder.unit}/s"
    ]
    for key, samples in sets.items():
        missing = feature_cache.missing(encoder, samples, encoder.cache)
        state = f"{duration(missing / rate)} to extract" if missing else "features are in the cache"
        out.append(
            f"{key}: {len(samples):,} {encoder.unit}, {4 * width * len(samples) / 1e9:,.2f} GB of features; {state}"
        )
    classes, is_exact = _classes(encoder, next(iter(sets.values())))
    flops = _flops(encoder.device)
    counts = [len(sets[key]) if key in sets else 0 for key in ("gallery", "query")]
    for name, protocol, cfg in chosen:
        if not hasattr(protocol, "cost"):
            out.append(f"{name}: its memory does not depend on the size of the set; its time is not planned")
            continue
        size, operations = protocol.cost(cfg, *counts, width // (encoder.layers + 1), classes, encoder.layers)
        at_least = "" if is_exact else "at least "
        out.append(
            f"{name}: {at_least}{size / 1e6:,.0f} MB, {at_least}{duration(operations / flops)} on {encoder.device}"
        )
    return [*out, f"classes: {classes:,}{'' if is_exact else f' among {LABELS_READ} labels'}"]


def _tensors(backbone: Any) -> list[torch.Tensor]:
    return [*backbone.parameters(), *backbone.buffers()] if isinstance(backbone, torch.nn.Module) else []


def _speed(encoder: Any, samples: Samples) -> tuple[float, int]:
    """(samples per second that are read and encoded, width of a stored row), from the second of two batches."""
    numbers = np.linspace(0, len(samples) - 1, min(len(samples), 2 * encoder.batch)).round().astype(int).tolist()
    began, count, width = 0.0, 0, 0
    for of_batch, found in feature_cache.read_batches(lambda n: _read(encoder, samples, n), numbers, encoder.batch):
        usable = [one for one in found if not isinstance(one, Damaged)]
        if usable:
            start = time.perf_counter()
            width = encoder.stored(usable).shape[1]
            began, count = began or start, len(of_batch) if began else count
    if not width:
        raise DataError(f"{samples.names}: none of {len(numbers)} {encoder.unit} can be read")
    return max(1, count or len(numbers)) / (time.perf_counter() - began), width


def _read(encoder: Any, samples: Samples, number: int) -> Any:
    try:
        return encoder.read(samples, number)
    except Damaged as reason:
        return reason


def _classes(encoder: Any, samples: Samples) -> tuple[int, bool]:
    """(number of classes, whether it is exact): those that the manifests name, or those among LABELS_READ labels."""
    if known := {name for each in samples.manifests for name in each.manifest.classes or ()}:
        return len(known), True
    found = set()
    for number in np.linspace(0, len(samples) - 1, min(len(samples), LABELS_READ)).round().astype(int):
        try:
            found.add(encoder.label(samples, int(number)))
        except Damaged:
            continue
        except DataError:
            break  # there are no labels
    return max(1, len(found)), len(samples) <= LABELS_READ


def _flops(device: torch.device) -> float:
    """Floating-point operations per second of a matrix product in fp32."""
    a = torch.ones(SIDE, SIDE, device=device)
    for _ in range(2):  # the first one includes the start of the device's libraries
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds = time.perf_counter() - start
    return 2 * SIDE**3 / seconds
