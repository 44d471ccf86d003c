"""Compare a teacher and its students, or any models, side by side: the scores of the same protocols on the same data, the
share of the teacher's scores that a student keeps, the similarity of its features to the teacher's (CKA), its size, and
how fast it is on this machine.

`compare` returns one `Compared` for each model, the teacher first; `table` makes text of them, `as_json` plain values,
and `write_page` an HTML file with plots.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import output
from common.errors import UserError
from common.untrusted import is_number
from eval import pictures
from eval.cka import cka
from eval.feature_cache import Labelled
from eval.feature_rows import Subset
from eval.features import Encoder
from eval.report_page import page, section
from eval.run import configured, refuse_files, rows_of
from pretrain.interchange.run_facts import LOWER_IS_BETTER, MAIN_METRICS, PROTOCOL_NAMES

BATCH = 32  # samples whose throughput is measured
ROUNDS, MIN_SECONDS = 7, 0.1  # of a measurement: how often each model has its turn, and how long a turn takes at least


@dataclass
class Compared:
    """What is known about a model."""

    model: str  # as it was named
    parameters: int
    megabytes: float  # of its weights in memory, in units of 10⁶ bytes
    image_size: int | None  # side of its images in pixels; None for texts and audio
    latency_ms: float  # time of one sample, from prepared input to pooled features on the CPU; the median of several
    throughput: float  # samples per second in batches of BATCH
    cka: float  # of its pooled features with those of the teacher
    cka_samples: int  # of the query, that both models can read
    scores: dict[str, dict[str, float]]  # {protocol: {metric: value}}
    # {protocol: share of the teacher's main score; for errors, of the teacher's error in its own}
    kept: dict[str, float]
    notes: list[str]


def compare(
    models: Sequence[str],
    names: Sequence[str],
    gallery: Sequence[str],
    query: Sequence[str],
    image_size: int | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
) -> list[Compared]:
    """One entry for each model; the first one is the teacher. The arguments are those of `eval.run.evaluate`. Raises
    UserError or DataError for a model or data that cannot be scored."""
    encoders, scored = list[Any](), list[tuple[int, list[tuple[str, Any, Any]]]]()
    for model in models:
        encoder, facts, chosen = configured(model, names, image_size, options, device, cache)
        refuse_files([(name, cfg) for name, _, cfg in chosen])
        if encoders and encoder.unit != encoders[0].unit:
            raise UserError(
                f"{model}: reads {encoder.unit}, but {models[0]} reads {encoders[0].unit}; compare like models"
            )
        encoders.append(encoder)
        scored.append((facts.get("step", 0), chosen))
    # Before the scores, which may take long, because it can fail.
    sets = [_features(encoder, list(query)) for encoder in encoders]
    similarities = [_similarity(sets[0], each, encoder.device) for each, encoder in zip(sets, encoders, strict=True)]
    all_rows = [
        [row for each in chosen for row in rows_of(encoder, step, *each, list(gallery), list(query), "custom")]
        for encoder, (step, chosen) in zip(encoders, scored, strict=True)
    ]
    times = measure(encoders)
    out = list[Compared]()
    for n, (model, encoder, rows) in enumerate(zip(models, encoders, all_rows, strict=True)):
        scores: dict[str, dict[str, float]] = {}
        for row in rows:
            scores.setdefault(row["protocol"], {})[row["metric"]] = row["value"]
        similarity, count = similarities[n]
        tensors = _tensors(encoder.backbone)
        entry = Compared(
            model,
            sum(t.numel() for t in tensors),
            round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 3),
            getattr(encoder, "image_size", None),
            round(times[n][0], 3),
            round(times[n][1], 3),
            round(similarity, 6),
            count,
            scores,
            _kept(out[0].scores if out else scores, scores),
            list(dict.fromkeys(row["note"] for row in rows if row.get("note"))),
        )
        out.append(entry)
    return out


def main_metric(scores: dict[str, float]) -> str:
    """The main metric of a protocol, or "" if it has none."""
    return next((name for name in MAIN_METRICS if name in scores), "")


def _kept(teacher: dict[str, dict[str, float]], student: dict[str, dict[str, float]]) -> dict[str, float]:
    """{protocol: share of the teacher's main score}."""
    out = {}
    for protocol, scores in student.items():
        if metric := main_metric(scores):
            own, of_teacher = scores[metric], teacher[protocol][metric]
            top, bottom = (of_teacher, own) if metric in LOWER_IS_BETTER else (own, of_teacher)
            if bottom:
                out[protocol] = round(top / bottom, 6)
    return out


def _features(encoder: Any, query: list[str]) -> Labelled:
    """The pooled features of the query, which need not have labels."""
    samples = encoder.check(query)
    if isinstance(encoder, Encoder) and not {"cls", "json"} & {*samples.extensions}:
        encoder = encoder.variant(has_labels=False)
    return encoder.labelled(query)


def _similarity(teacher: Labelled, student: Labelled, device: torch.device) -> tuple[float, int]:
    """(CKA, number of samples) of the samples that both have read."""
    _, of_teacher, of_student = np.intersect1d(teacher.numbers, student.numbers, return_indices=True)
    x, y = (
        Subset(each.features, torch.from_numpy(numbers))
        for each, numbers in ((teacher, of_teacher), (student, of_student))
    )
    return cka(x, y, device=device if device.type == "cuda" else "cpu"), len(of_teacher)


def measure(encoders: Sequence[Any]) -> list[tuple[float, float]]:
    """(milliseconds of one sample, samples per second in batches) of each encoder. They take turns, so that what else the
    machine does affects all of them alike; the median of the turns counts."""
    inputs = [[[encoder.stand_in()] * count for count in (1, BATCH)] for encoder in encoders]
    seconds: list[list[list[float]]] = [[[], []] for _ in encoders]
    for turn in range(ROUNDS + 1):
        for encoder, given, found in zip(encoders, inputs, seconds, strict=True):
            for batch, times in zip(given, found, strict=True):
                start, calls = time.perf_counter(), 0
                while not calls or time.perf_counter() - start < (MIN_SECONDS if turn else 0):
                    encoder.pooled(batch)
                    calls += 1
                if turn:  # the first one allocates memory
                    times.append((time.perf_counter() - start) / calls)
    return [(1000 * statistics.median(one), BATCH / statistics.median(many)) for one, many in seconds]


def _tensors(backbone: Any) -> list[torch.Tensor]:
    return [*backbone.parameters(), *backbone.buffers()] if isinstance(backbone, torch.nn.Module) else []


# ---------------------------------------------------------------- text, JSON and a page
def short_names(models: Sequence[str]) -> list[str]:
    """The ends of the models' paths without "export", as long as is needed to tell them apart, such as "small/600"."""
    parts = [[part for part in Path(model).parts if part != "export"] or [model] for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len({*names}) == len({*models}) and not any(map(is_number, names)):
            return names
    return list(models)


def table(compared: Sequence[Compared]) -> list[str]:
    """Lines of text, with a column for each protocol."""
    head = ["", "parameters", "MB", "ms", "samples/s", "CKA", *map(_column, _protocols(compared))]
    cells = [head]
    for name, one in zip(short_names([each.model for each in compared]), compared, strict=True):
        cells.append([name, *_values(one), *(_score(one, protocol) for protocol in _protocols(compared))])
    notes = dict.fromkeys(f"note: {note}" for one in compared for note in one.notes)
    return [*output.columns(cells, [12, 12, 8, 8, 11, 7, *[20] * len(_protocols(compared))]), *notes]


def _values(one: Compared) -> list[str]:
    return [
        f"{one.parameters / 1e6:,.2f} M",
        f"{one.megabytes:,.1f}",
        f"{one.latency_ms:,.1f}",
        f"{one.throughput:,.0f}",
        f"{one.cka:.3f}",
    ]


def _protocols(compared: Sequence[Compared]) -> list[str]:
    return [name for name, scores in compared[0].scores.items() if main_metric(scores)]


def _column(protocol: str) -> str:
    return PROTOCOL_NAMES.get(protocol, protocol)


def _score(one: Compared, protocol: str) -> str:
    """The main score, and the share of the teacher's."""
    metric = main_metric(one.scores[protocol])
    kept = f" ({one.kept[protocol]:.1%})" if protocol in one.kept else ""
    return MAIN_METRICS[metric].format(one.scores[protocol][metric]) + kept


def as_json(compared: Sequence[Compared], gallery: Sequence[str], query: Sequence[str], device: str) -> dict[str, Any]:
    """Plain values of a comparison, with its conditions."""
    return {
        "gallery": list(gallery),
        "query": list(query),
        "device": device,
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "models": [asdict(one) for one in compared],
    }


def write_page(compared: Sequence[Compared], target: Path, about: str) -> Path:
    """Write the table, and plots of each main score against size and latency, as an HTML file. `about`: on which data and
    device."""
    names = short_names([each.model for each in compared])
    head = ["", "parameters", "weights, MB", "latency, ms", "samples/s", "CKA", *map(_column, _protocols(compared))]
    body = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = f"<tr>{body}</tr>"
    for name, one in zip(names, compared, strict=True):
        cells = [*_values(one), *(_score(one, protocol) for protocol in _protocols(compared))]
        lines += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    charts = []
    for protocol in _protocols(compared):
        metric = main_metric(compared[0].scores[protocol])
        share = MAIN_METRICS[metric].endswith("%}")
        values = [one.scores[protocol][metric] for one in compared]
        title = _column(protocol) if metric == "accuracy" else f"{_column(protocol)}, {metric.replace('_', ' ')}"
        for what, unit, of in (
            ("size", "million parameters", [one.parameters / 1e6 for one in compared]),
            ("latency", "ms for one sample", [one.latency_ms for one in compared]),
        ):
            charts.append(pictures.scatter(f"{title} and {what}", unit, names, of, values, percent=share))
    text = (
        "Percentages in brackets: the share of the first model's score that a model keeps. CKA: similarity of the pooled"
        " features to those of the first model, from 0 to 1. Latency and throughput: medians on this machine."
    )
    parts = [
        f"<h1>{escape(names[0])} and {len(compared) - 1} more</h1><p>{escape(about)}</p>",
        section(
            "Side by side", text, f'<div class="card scroll"><table class="runs wide">{lines}</table></div>', kind=""
        ),
        section("Score against cost", "", *charts, columns="400px"),
        "".join(
            f'<p class="down">note: {escape(note)}</p>'
            for note in dict.fromkeys(n for one in compared for n in one.notes)
        ),
    ]
    return page(target, "comparison of models", *parts)
