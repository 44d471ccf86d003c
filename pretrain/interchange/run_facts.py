"""What a run has trained, on which data, and what its scores say: the facts at the top of its report and on the model
card. All of them are read from files of the run folder. This module does not import torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.output import mask_secrets
from pretrain import collapse_monitor
from pretrain.recipes.recipe import Recipe

Row = Mapping[str, Any]

MAIN_METRICS = {  # {the main metric of a protocol: its number format}
    "accuracy": "{:.1%}",
    "bits_per_byte": "{:.3f}",
    "miou": "{:.1%}",
    "rmse": "{:.3f}",
    "map": "{:.1%}",
    "rankme": "{:.1f}",
    "worst_group": "{:.1%}",
    "corruption_error": "{:.1%}",
    "image_to_text_1": "{:.1%}",
}
LOWER_IS_BETTER = ("bits_per_byte", "rmse", "corruption_error")
SHARED_NAMES = {"accuracy": "", "image_to_text_1": "recall of captions at 1", "miou": "mIoU", "rankme": "RankMe"}
PROTOCOL_NAMES = {"knn": "k-NN", "health": "health of the features"}
FLOORS = {  # {model of a row: its name in a sentence}
    "untrained": "the untrained network",
    "pixels": "raw pixels",
    "bytes": "raw bytes",
    "clip_pixels": "raw pixels",
    "log_mel": "log-mel statistics",
}
UNITS = {
    "image": "images",
    "clip": "videos",
    "tokens": "rows",
    "audio": "recordings",
}  # the word for samples, for each part that a model can read
SPLITS = {"test": "test", "full": "validation", "val": "validation", "train": "training"}  # as they are called in text
MAX_SHARD_NAMES = 3  # names of training sets that a sentence lists


class Finding(NamedTuple):
    """The main score of the trained model by one protocol, and its distances from floors."""

    protocol: str
    metric: str
    row: Row  # of the trained model
    floors: dict[str, float]  # {model: value} of the floors that were scored on the same data

    @property
    def title(self) -> str:
        name = PROTOCOL_NAMES.get(self.protocol, self.protocol)
        metric = SHARED_NAMES.get(self.metric, self.metric.replace("_", " "))
        return name if not metric or metric == name.replace("_", " ") else f"{name}, {metric}"

    @property
    def value(self) -> str:
        return MAIN_METRICS[self.metric].format(self.row["value"])

    def scored(self, split: str) -> str:
        """On what the score was computed, such as " of 400 test images"."""
        count, unit = self.row.get("count"), self.row.get("unit", "images")
        return f" of {count:,} {SPLITS[split]} {unit}" if count else ""

    def sentence(self, split: str) -> str:
        """The score and its distances from floors."""
        return ", ".join(
            [f"{self.title}: {self.value}{self.scored(split)}", *(self.comparison(floor) for floor in self.floors)]
        )

    def gain(self, floor: str) -> float:
        """How much better than this floor the model is, in the unit of the metric. Negative: worse."""
        difference = self.row["value"] - self.floors[floor]
        return -difference if self.metric in LOWER_IS_BETTER else difference

    def comparison(self, floor: str) -> str:
        """The same as text, such as "12.3 points above raw pixels"."""
        gain, form = self.gain(floor), MAIN_METRICS[self.metric]
        higher = (gain > 0) == (self.metric not in LOWER_IS_BETTER)
        amount = f"{100 * abs(gain):.1f} points" if form.endswith("%}") else form.format(abs(gain))
        if not gain:
            return f"equal to {FLOORS[floor]}"
        doubt = f" (within ±{100 * self.interval:.1f})" if not self.is_certain(floor) else ""
        return f"{amount} {'above' if higher else 'below'} {FLOORS[floor]}{doubt}"

    @property
    def interval(self) -> float:
        """Half of the 95% interval of an accuracy, from the number of samples; 0 for other metrics."""
        value, count = self.row["value"], self.row.get("count", 0)
        if self.metric != "accuracy" or not count or not 0 <= value <= 1:
            return 0.0
        return 1.96 * math.sqrt(value * (1 - value) / count)

    def is_certain(self, floor: str) -> bool:
        """Whether the distance to a floor is larger than the interval."""
        return abs(self.gain(floor)) > self.interval


def findings(rows: Iterable[Row], model: str = "pretrained") -> list[Finding]:
    """The main score of `model` by each protocol, from rows that score the same data. The last export of a model is
    used, and the newest of several rows for the same export."""
    newest: dict[str, dict[tuple[str, str], Row]] = {}
    for row in sorted(rows, key=lambda r: r["step"]):
        newest.setdefault(row["protocol"], {})[row["metric"], row["model"]] = row
    out = []
    for protocol, table in newest.items():
        if metric := next((name for name in MAIN_METRICS if (name, model) in table), None):
            row = table[metric, model]
            found = {each: table[metric, each]["value"] for each in FLOORS if (metric, each) in table and each != model}
            out.append(Finding(protocol, metric, row, {k: v for k, v in found.items() if math.isfinite(v)}))
    return out


def best_evidence(
    rows: list[dict[str, Any]], step: int | None = None, model: str = "pretrained"
) -> tuple[str, list[Finding]]:
    """(the split, its findings) of the most telling split that has scores of the trained model: the test set, or else
    the validation set, or else the features of the training images, which need no labels. `step`: of the export that
    shall be described; None: the last one with scores."""
    for split in ("test", "full", "val", "train"):
        chosen = [r for r in rows if r.get("split") == split]
        if step is not None:
            chosen = [r for r in chosen if r["model"] in FLOORS or r["step"] == step]
        if found := findings(chosen, model):
            return split, found
    return "", []


def facts(run: Path, recipe: Recipe, rows: list[dict[str, Any]], parameters: int | None = None) -> dict[str, str]:
    """{name: value} of a run. `rows`: of metrics.jsonl; `parameters`: their number in the encoder, if it
    is known."""
    log = (run / "log.txt").read_text(errors="replace") if (run / "log.txt").is_file() else ""
    # The last line of the log that describes a start of the run.
    starts = re.findall(r" trained\), (\d+) samples, batch [\d.]+(?: s)?, (.+?),", log)
    samples, precision = starts[-1] if starts else ("", recipe.precision)
    out = {
        "objective": recipe.objective.name,
        "encoder": recipe.model.name,
        "its parameters": "" if parameters is None else f"{parameters / 1e6:.1f} M",
        f"training {UNITS[recipe.model.reads]}": samples and f"{int(samples):,}",
        "steps × batch": f"{recipe.steps:,} × {recipe.data.batch_text}",
        "precision": precision,
        "training time": duration(training_seconds(rows, recipe.data.batch_size)),
        "training data": data_names(recipe),
    }
    return {name: value for name, value in out.items() if value}


def data_names(recipe: Recipe) -> str:
    """The sets of the training data, such as "photos/train, web/train"."""
    mix = recipe.data.mix
    names = list(recipe.data.train) or [", ".join(each.shards) for each in mix]
    more = f" and {len(names) - MAX_SHARD_NAMES} more" if len(names) > MAX_SHARD_NAMES else ""
    return mask_secrets(", ".join(names[:MAX_SHARD_NAMES]) + more)


def training_seconds(rows: list[dict[str, Any]], batch: int) -> float:
    """The time that all steps took. `rows`: of metrics.jsonl, one for each step. The speed in a row is the mean over the
    steps since the previous row with a speed; it states their number of samples if that varies."""
    with_speed = [i for i, row in enumerate(rows) if row.get("samples_per_second")]
    return sum(
        rows[i].get("samples", (i - previous) * batch) / rows[i]["samples_per_second"]
        for previous, i in zip([-1, *with_speed], with_speed, strict=False)
    )


def duration(seconds: float) -> str:
    """Seconds as text, in seconds, minutes or hours; "" for 0."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s" if seconds else ""
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def collapse(recipe: Recipe, rows: list[dict[str, Any]]) -> str:
    """`collapse_monitor.verdict` of a run. `rows`: of metrics.jsonl."""
    return collapse_monitor.verdict(rows, recipe.objective.assignments(), recipe.optim.lr.warmup_steps())


def data_sets(run: Path) -> list[str]:
    """A line for each set of the training data, from the manifests that the run has stored: the number of samples, or
    of documents and tokens, and the fingerprint, a digest of the hashes of all shards."""
    from data_pipeline.shards.manifest import parse_manifest

    lines = []
    for path in sorted((run / "data").glob("[0-9]*.json")):
        manifest = parse_manifest(path.read_bytes(), str(run / "data"), str(path))
        amount = f"{manifest.samples} samples"
        if text := manifest.details.get("text"):
            amount = f"{text['documents']:,} documents, " if "documents" in text else ""
            amount += f"{text['tokens']:,} tokens"
            amount += f", {text['bytes'] / 1e6:,.1f} MB of text" if "bytes" in text else ""
        lines.append(f"{amount} in {len(manifest.names)} shards, fingerprint `{manifest.id}`")
    return lines
