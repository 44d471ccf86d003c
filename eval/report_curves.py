"""The curves of a report, in groups: learning and health, which are always shown, and speed and data, which are folded."""

from __future__ import annotations

from eval import pictures
from eval.report_page import folded, section
from eval.tiers import QUICK_TO_FULL
from pretrain.run_folder.scalars import BASELINES

MAX_VALUE = 1e30  # larger values are not drawn
ACCURACIES = ("accuracy", "balanced_accuracy")
FURTHER = ("miou", "rmse", "map", "worst_group", "corruption_error")  # other metrics that are drawn
NOT_TERMS = ("step", "loss", "grad_norm", "lr")  # logged quantities that are not terms of the objective
# Logged quantities that show whether features and gradients are healthy, without the name of a student before them.
HEALTH = ("feature_std", "rank", "teacher_entropy", "grad_norm", "loss_scale", "skipped")
# Curves of the folded parts, in order: {logged quantity: (title, unit, factor that converts it to the unit)}.
SPEED: dict[str, tuple[str, str, float]] = {
    "samples_per_second": ("samples per second", "samples/s", 1),
    "tokens_per_second": ("tokens per second", "tokens/s", 1),
    "flops_per_second": ("model FLOP/s", "FLOP/s", 1),
    "mfu": ("share of the peak FLOP/s (MFU)", "%", 1),
    "memory_gb": ("peak memory of a process", "B", 1e9),
}
DATA: dict[str, tuple[str, str, float]] = {
    "tokens": ("tokens seen", "tokens", 1),
    "epoch": ("epochs of the data", "epochs", 1),
    "stream/wait_ms_p50": ("wait for a batch, median", "ms", 1),
    "stream/wait_ms_p99": ("wait for a batch, 99th percentile", "ms", 1),
    "stream/mb": ("bytes read since the previous row", "B", 1e6),
    "stream/held_mb": ("bytes kept for shuffling", "B", 1e6),
    "stream/queue": ("chunks that are being read", "chunks", 1),
    "stream/requests": ("requests to the store", "requests", 1),
    "stream/retries": ("retried requests", "requests", 1),
    "stream/hedges": ("hedged requests", "requests", 1),
    "stream/hits": ("chunks found in the cache", "chunks", 1),
    "stream/damaged": ("damaged samples", "samples", 1),
    "stream/process": ("rank that waits longest", "", 1),
}
SHARES = {"data_share": "waiting for data", "loop_share": "loop"}  # logged shares of the time: {quantity: name}


def curves(rows: list[dict], scores: list[dict]) -> str:
    """The section of curves as HTML. `rows`: the metrics of each step; `scores`: the rows of results.jsonl."""
    charts = [pictures.chart("loss", {"": series("loss", rows)})]
    bits = [r for r in scores if (r.get("split"), r["metric"]) == ("val", "bits_per_byte")]
    charts.append(pictures.chart("bits per byte on val", {"": series("value", bits)}, points=True))
    charts += _score_charts(scores)
    keys = dict.fromkeys(key for row in rows for key in row)  # in order, without repetitions
    terms = [key for key in keys if key not in (*NOT_TERMS, *SHARES, *SPEED) and not _is_data(key)]
    healthy = [key for key in [*terms, "grad_norm"] if key.rpartition("/")[2] in HEALTH]
    charts += [pictures.chart(_title(key), {"": series(key, rows)}) for key in terms if key not in healthy]
    charts.append(pictures.chart("learning rate", {"": series("lr", rows)}, smooth=False))
    health = [pictures.chart(_title(key), {"": series(key, rows)}) for key in healthy]
    measured = [r for r in scores if r["protocol"] == "health" and r["model"] not in BASELINES]
    for metric in dict.fromkeys(r["metric"] for r in measured):
        values = series("value", [r for r in measured if r["metric"] == metric])
        health.append(pictures.chart(f"{_title(metric)} of the features", {"": values}, points=True))
    text = (
        "The thin line shows the value of each step, clipped to the frame. The thick line is the moving mean; its last"
        " value is at the top right."
    )
    of_health = (
        "Whether gradients are stable and features use their dimensions: a rank or a deviation that falls to nearly"
        " nothing is a collapse."
    )
    return section("Curves: learning", text, *charts) + (
        section("Curves: health", of_health, *health) if any(health) else ""
    )


def folded_curves(rows: list[dict]) -> list[str]:
    """The folded cards with curves of speed and of data."""
    keys = dict.fromkeys(key for row in rows for key in row)
    speed = [_system_chart(key, rows) for key in SPEED if key in keys]
    shares = {name: series(key, rows) for key, name in SHARES.items()}
    speed.insert(1, pictures.chart("share of time", shares, percent=True, zero=True))
    of_data = [key for key in DATA if key in keys] + [key for key in keys if key not in DATA and _is_data(key)]
    return [
        folded("Curves: speed and memory", *speed),
        folded("Curves: data", *(_system_chart(key, rows) for key in of_data)),
    ]


def series(key: str, rows: list[dict]) -> tuple[list[float], list[float]]:
    """(steps, values) of a quantity, in order of the steps."""
    found = {r["step"]: r[key] for r in rows if type(r.get(key)) in (int, float) and abs(r[key]) < MAX_VALUE}
    return sorted(found), [found[step] for step in sorted(found)]


def _is_data(key: str) -> bool:
    return key in DATA or key.startswith(("stream/", "epoch/"))


def _title(key: str) -> str:
    return key.replace("_", " ")


def _score_charts(scores: list[dict]) -> list[str]:
    """Charts of the scores during the run: a chart of accuracies, and one for each other metric, of each protocol."""
    charts = []
    shown = [r for r in scores if r.get("split") in QUICK_TO_FULL and r["model"] not in BASELINES]
    for split, protocol in dict.fromkeys((r["split"], r["protocol"]) for r in shown):
        of_protocol = [r for r in shown if (r["split"], r["protocol"]) == (split, protocol)]
        by_metric = {m: series("value", [r for r in of_protocol if r["metric"] == m]) for m in FURTHER}
        lines = {m.partition("_")[0]: series("value", [r for r in of_protocol if r["metric"] == m]) for m in ACCURACIES}
        title = f"{'k-NN' if protocol == 'knn' else protocol} on {split}"
        charts.append(pictures.chart(title, lines, percent=True, points=True))
        for metric, points in by_metric.items():
            charts.append(pictures.chart(f"{title}: {metric}", {"": points}, percent=metric == "miou", points=True))
    return charts


def _system_chart(key: str, rows: list[dict]) -> str:
    title, unit, factor = {**SPEED, **DATA}.get(key, (_title(key).replace("/", " "), "", 1))
    steps, values = series(key, rows)
    percent = unit == "%"
    scaled = {"": (steps, [value * factor for value in values])}
    return pictures.chart(title, scaled, percent=percent, zero=True, unit="" if percent else unit)
