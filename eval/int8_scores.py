"""An encoder with int8 weights beside the full one: `compare(folder, …)` writes FOLDER/model.int8.onnx, scores both by the
same protocols, measures their size and speed, and says which layers lose most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from common import output
from common.errors import UserError
from data_pipeline.storage.urls import write_atomically
from eval import pictures
from eval.features import Encoder
from eval.model_comparison import BATCH, main_metric, measure
from eval.results import Row
from eval.run import configured, refuse_files, rows_of
from pretrain.interchange import int8
from pretrain.interchange.run_facts import MAIN_METRICS, PROTOCOL_NAMES
from pretrain.models.layers import Features

SHOWN_LAYERS = 8  # in the text; the file has all


def compare(
    folder: Path,
    names: Sequence[str],
    gallery: Sequence[str],
    query: Sequence[str],
    image_size: int | None,
    options: dict[str, dict[str, Any]] | None,
    cache: str | Path | None,
    samples: int,
    reduce_range: bool,
) -> dict[str, Any]:
    """The contents of FOLDER/int8.json, which is written, too: {"bytes", "scores", "latency_ms", "throughput": {"fp32",
    "int8"}, "features": the relative error of the pooled features, "layers": of each linear layer}. Everything runs on
    the CPU, which is where the int8 file runs. `samples`: number of images of the query that losses are computed on."""
    encoder, facts, chosen = configured(str(folder), names, image_size, options, "cpu", cache)
    refuse_files([(name, cfg) for name, _, cfg in chosen])
    if type(encoder) is not Encoder or not isinstance(encoder.backbone, torch.nn.Module):
        raise UserError(f"{folder}: int8 files are written of exports that read images; name such a folder")
    path = int8.quantize(folder, encoder.backbone, reduce_range)
    backbone = encoder.backbone
    # Both are functions for the protocols, so that both give the features of the last block only.
    quantized = int8.OnnxBackbone(path, encoder.patch_size)
    both = {
        "fp32": encoder.variant(backbone=_Plain(backbone), layers=0, _sets={}),
        "int8": encoder.variant(
            backbone=quantized, layers=0, _sets={}, name="int8", model_hash=xxhash.xxh3_128_hexdigest(path.read_bytes())
        ),
    }
    shards = encoder.check(list(query))
    images, _, _ = pictures.load_some(shards, samples, encoder.image_size, encoder.channels, encoder.dtype)
    pixels = encoder.part.place(torch.from_numpy(images), encoder.device)
    whole, rounded = (each.pooled(images) for each in both.values())
    scores: dict[str, dict[str, dict[str, float]]] = {}
    rows: list[Row] = []
    for kind, each in both.items():
        for one in chosen:
            rows += rows_of(each, facts.get("step", 0), *one, list(gallery), list(query), kind)
    for row in rows:
        scores.setdefault(row["protocol"], {}).setdefault(row["metric"], {})[row["split"]] = row["value"]
    times = dict(zip(both, measure([*both.values()]), strict=True))
    tensors = [*backbone.parameters(), *backbone.buffers()]
    found = {
        "gallery": list(gallery),
        "query": list(query),
        "reduce_range": reduce_range,
        "bytes": {"fp32": sum(t.numel() * t.element_size() for t in tensors), "int8": path.stat().st_size},
        "latency_ms": {kind: round(value[0], 3) for kind, value in times.items()},
        "throughput": {kind: round(value[1], 3) for kind, value in times.items()},
        "scores": scores,
        "features": round(float((rounded - whole).norm() / whole.norm()), 6),
        "layers": [asdict(loss) for loss in int8.layer_losses(backbone, pixels, encoder.pool)],
    }
    write_atomically(str(folder / "int8.json"), [(json.dumps(found, indent=1) + "\n").encode()])
    return found


class _Plain:
    """A backbone as a function, without the features of inner blocks."""

    def __init__(self, backbone: Any):
        self._backbone, self.patch_size = backbone, backbone.patch_size

    def __call__(self, images: torch.Tensor) -> Features:
        return self._backbone(images)


def lines(found: dict[str, Any]) -> list[str]:
    """The text about a comparison."""
    cells = [["", "fp32", "int8", ""]]
    for protocol, metrics in found["scores"].items():
        if metric := main_metric(metrics):
            full, small = metrics[metric]["fp32"], metrics[metric]["int8"]
            form = MAIN_METRICS[metric]
            change = f"{100 * (small - full):+.1f} points" if form.endswith("%}") else f"{small - full:+.3g}"
            cells.append([PROTOCOL_NAMES.get(protocol, protocol), form.format(full), form.format(small), change])
    for title, key, form, scale in (
        ("MB of weights, of the file", "bytes", "{:,.2f}", 1e-6),
        ("ms for one sample", "latency_ms", "{:,.1f}", 1.0),
        (f"samples/s in batches of {BATCH}", "throughput", "{:,.0f}", 1.0),
    ):
        cells.append([title, *(form.format(scale * found[key][kind]) for kind in ("fp32", "int8")), ""])
    out = output.columns(cells, [30, 10, 10])
    out += ["", f"features: relative error {found['features']:.2%}; if only one layer is int8 (all layers: int8.json):"]
    table = [["layer", "features", "its output", "largest input / rms"]]
    table += [
        [one["layer"], f"{one['features']:.2%}", f"{one['own']:.2%}", f"{one['outliers']:.1f}"]
        for one in found["layers"][:SHOWN_LAYERS]
    ]
    return [*out, *output.columns(table, [30, 12, 12])]
