"""The names under which TensorBoard and trackers show metrics and scores. This module does not import torch."""

from __future__ import annotations

from typing import Any

NO_SCALARS = ("step", "stage", "val_loss")  # entries of a row of metrics.jsonl that are not averaged
# models whose scores belong to no step, and are in results.jsonl only
BASELINES = ("pixels", "clip_pixels", "bytes", "log_mel")


def scalars(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """{step: {name: value}} from the rows of one write to metrics.jsonl: the means of metrics at the last step, and
    each validation loss at its own step."""
    out: dict[int, dict[str, float]] = {row["step"]: {"val/loss": row["val_loss"]} for row in rows if "val_loss" in row}
    means = out.setdefault(rows[-1]["step"], {})
    for key in rows[-1]:
        if key not in NO_SCALARS:
            found = [row[key] for row in rows if key in row]
            means[f"train/{key}"] = sum(found) / len(found)
    return dict(sorted(out.items()))


def score_name(row: dict[str, Any]) -> str:
    """The name of a row of results.jsonl."""
    student = "" if row["model"] in ("untrained", "pretrained") else f"{row['model']}/"
    return f"{student}{row['split']}/{row['protocol']}/{row['metric']}"
