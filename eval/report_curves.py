"""The section of a report with curves: loss, scores on val, and the terms of the objective. Curves of speed, memory and
the data stream are in a folded part.
"""

from __future__ import annotations

from eval import pictures
from eval.report_text import section
from eval.tiers import QUICK_TO_FULL
from pretrain.run_folder.scalars import BASELINES

MAX_VALUE = 1e30  # larger values are not drawn
ACCURACIES = ("accuracy", "balanced_accuracy")
FURTHER = ("miou", "rmse", "map", "worst_group", "corruption_error")  # other metrics that are drawn
NOT_TERMS = ("step", "loss", "grad_norm", "lr")  # logged quantities that are not terms of the objective
# Curves of the folded part, in order: {logged quantity: (title, unit, factor that converts it to the unit)}.
SYSTEM: dict[str, tuple[str, str, float]] = {
    "samples_per_second": ("samples per second", "samples/s", 1),
    "tokens_per_second": ("tokens per second", "tokens/s", 1),
    "flops_per_second": ("model FLOP/s", "FLOP/s", 1),
    "mfu": ("share of the peak FLOP/s (MFU)", "%", 1),
    "memory_gb": ("peak memory of a process", "B", 1e9),
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

    def series(key: str, among: list[dict] = rows) -> tuple[list[float], list[float]]:
        """(steps, values) of a quantity, in order of the steps."""
        found = {r["step"]: r[key] for r in among if type(r.get(key)) in (int, float) and abs(r[key]) < MAX_VALUE}
        return sorted(found), [found[step] for step in sorted(found)]

    charts = [pictures.chart("loss", {"": series("loss")})]
    bits = [r for r in scores if (r.get("split"), r["metric"]) == ("val", "bits_per_byte")]
    charts.append(pictures.chart("bits per byte on val", {"": series("value", bits)}, points=True))
    shown = [r for r in scores if r.get("split") in QUICK_TO_FULL and r["model"] not in BASELINES]
    for split, protocol in dict.fromkeys((r["split"], r["protocol"]) for r in shown):
        of_protocol = [r for r in shown if (r["split"], r["protocol"]) == (split, protocol)]
        by_metric = {m: series("value", [r for r in of_protocol if r["metric"] == m]) for m in FURTHER}
        lines = {m.partition("_")[0]: series("value", [r for r in of_protocol if r["metric"] == m]) for m in ACCURACIES}
        title = f"{'k-NN' if protocol == 'knn' else protocol} on {split}"
        charts.append(pictures.chart(title, lines, percent=True, points=True))
        for metric, points in by_metric.items():
            charts.append(pictures.chart(f"{title}: {metric}", {"": points}, percent=metric == "miou", points=True))
    keys = dict.fromkeys(key for row in rows for key in row)  # in order, without repetitions
    logged = [key for key in keys if key not in (*NOT_TERMS, *SHARES)]
    system = [key for key in SYSTEM if key in logged]
    system += [key for key in logged if key not in SYSTEM and key.startswith(("stream/", "epoch/"))]
    for key in [*(key for key in logged if key not in system), "grad_norm"]:
        charts.append(pictures.chart(key.replace("_", " "), {"": series(key)}))
    charts.append(pictures.chart("learning rate", {"": series("lr")}, smooth=False))
    system_charts = []
    for key in system:
        title, unit, factor = SYSTEM.get(key, (key.replace("_", " ").replace("/", " "), "", 1))
        steps, values = series(key)
        scaled = {"": (steps, [value * factor for value in values])}
        percent = unit == "%"
        system_charts.append(pictures.chart(title, scaled, percent=percent, zero=True, unit="" if percent else unit))
    lines = {name: series(key) for key, name in SHARES.items()}
    system_charts.insert(1, pictures.chart("share of time", lines, percent=True, zero=True))
    folded = (
        '<details class="card"><summary>Speed, memory and the data stream</summary>'
        f'<div class="grid" style="--least:300px">{"".join(system_charts)}</div></details>'
    )
    text = (
        "The thin line shows the value of each step, clipped to the frame. The thick line is the moving mean; its last"
        " value is at the top right."
    )
    return section("Curves", text, *charts) + (folded if any(system_charts) else "")
