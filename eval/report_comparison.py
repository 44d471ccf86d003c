"""A page that compares runs: `write([Path("runs/a"), Path("runs/b")], Path("comparison.html"))`. It shows what each run
has trained, its scores beside those of the others, in what the recipes differ, and what the last checkpoint of each
makes of the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import config, yaml_values
from common.errors import DataError, UserError
from common.output import mask_secrets
from data_pipeline.formats.pixels import PIXEL_DTYPES
from data_pipeline.views.augmentations import center
from eval import feature_map, pictures
from eval.features import Encoder, open_encoder
from eval.report import open_run, status
from eval.report_curves import series
from eval.report_images import MAX_MAP_IMAGES, load_images
from eval.report_page import page, section
from pretrain.interchange import run_facts
from pretrain.parallel.device import scoring_device
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.scalars import BASELINES

MAX_RUNS = 8  # of a comparison; the style sheet has as many colours of lines
NOT_COMPARED = ("run", "overwrite")  # keys of recipes in which all runs differ


class Run(NamedTuple):
    """What the page reads of a run."""

    name: str
    recipe: Recipe
    rows: list[dict[str, Any]]  # of metrics.jsonl
    scores: list[dict[str, Any]]  # of results.jsonl
    encoder: Encoder
    facts: dict[str, str]


def write(folders: list[Path], target: Path) -> Path:
    """Write the page to `target`, and return it. Raises UserError for a folder that is no run with metrics and an
    export, for a folder that is named twice, and for too many."""
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UserError(f"{len(folders)} runs: a page compares 2 to {MAX_RUNS} runs; write fewer")
    resolved = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, path in zip(folders, resolved, strict=True) if resolved.count(path) > 1]:
        raise UserError(f"{twice[0]}: is named twice; write each run once")
    runs = [_open(folder, name) for folder, name in zip(folders, _names(folders, resolved), strict=True)]
    parts = [f"<h1>{escape(' · '.join(run.name for run in runs))}</h1>", _facts(runs), _scores(runs)]
    try:
        parts.append(_images(runs))
    except DataError as error:
        parts.append(f'<p class="soft">The pictures are missing: {escape(str(error))}</p>')
    parts += [_curves(runs), _recipes(runs)]
    return page(target, f"comparison of {len(runs)} runs", *parts)


def _names(folders: list[Path], resolved: list[Path]) -> list[str]:
    """The names of the folders, or their paths if two have the same name."""
    names = [path.name for path in resolved]
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]


def _open(folder: Path, name: str) -> Run:
    recipe, rows, exported = open_run(folder)
    device = scoring_device(recipe.eval.device, recipe.device)
    encoder = open_encoder(str(exported[max(exported)]), recipe.eval.image_size, device)[0]
    parameters = sum(p.numel() for p in encoder.backbone.parameters())
    facts = run_facts.facts(folder, recipe, rows, parameters)
    return Run(name, recipe, rows, read_rows(folder / "results.jsonl"), encoder, facts)


def _table(runs: list[Run], lines: Mapping[str, list[str]]) -> str:
    """A table with a column for each run. `lines`: {title of a line: cells}, which are HTML."""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{escape(title)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for title, cells in lines.items()
    )
    return f'<div class="card scroll"><table class="runs" style="min-width:{150 * (len(runs) + 1)}px"><tr><th></th>{head}</tr>{body}</table></div>'


def _facts(runs: list[Run]) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.facts)
    lines = {"status": [status(run.recipe, run.rows) for run in runs]}
    lines |= {key: [escape(run.facts.get(key, "")) for run in runs] for key in keys}
    return section("What was trained", "", _table(runs, lines), kind="")


def _scores(runs: list[Run]) -> str:
    """The main score of each protocol, and its distances from the floors of the run."""
    evidence = [run_facts.best_evidence(run.scores) for run in runs]
    lines: dict[str, list[str]] = {}
    different = []
    for key in dict.fromkeys((split, f.protocol, f.metric) for split, found in evidence for f in found):
        split, _, metric = key
        of_runs = [next((f for f in found if (own, f.protocol, f.metric) == key), None) for own, found in evidence]
        present = [found for found in of_runs if found is not None]
        title = f"{present[0].title} ({run_facts.SPLITS[split]})"
        if len({(str(f.row.get("gallery")), str(f.row.get("query"))) for f in present}) > 1:
            different.append(title)
        values = [found.row["value"] for found in present]
        best = min(values) if metric in run_facts.LOWER_IS_BETTER else max(values)
        lines[title] = [
            _score(found, len(present) > 1 and found.row["value"] == best) if found else "–" for found in of_runs
        ]
    if not lines:
        return section("Did they learn?", "None of these runs has been scored.", kind="")
    text = "The main score of each protocol for the last export, and its distance from what was not trained. Bold: the best run."
    if different:
        text += f' <span class="down">The runs were scored on different data by: {escape(", ".join(different))}.</span>'
    return section("Did they learn?", text, _table(runs, lines), kind="")


def _score(finding: run_facts.Finding, is_best: bool) -> str:
    value = f"<b>{finding.value}</b>" if is_best else finding.value
    interval = f" ± {100 * finding.interval:.1f}" if finding.interval else ""
    floors = "".join(f"<br><small>{escape(finding.comparison(floor))}</small>" for floor in finding.floors)
    return f"{value}{interval}{floors}"


def _images(runs: list[Run]) -> str:
    """Mosaics of the same images in the colours of each run's patch features, and maps of the features."""
    shown = [run for run in runs if run.recipe.model.reads == "image"]
    if not shown:
        return ""
    channels = shown[0].encoder.channels
    shown = [run for run in shown if run.encoder.channels == channels]
    size = max(run.encoder.image_size for run in shown)
    dtype = max((run.encoder.dtype for run in shown), key=PIXEL_DTYPES.index)
    found = load_images(shown[0].recipe, size, channels, dtype)
    groups = pictures.spread(found.labels, 8, 4)
    mosaics = [pictures.mosaic(found.images[np.concatenate(groups[i : i + 4])]) for i in (0, 4)]
    columns: dict[str, list[np.ndarray]] = {}
    maps = []
    numbers = np.linspace(0, len(found.images) - 1, min(MAX_MAP_IMAGES, len(found.images))).round().astype(int)
    labels = [found.labels[n] for n in numbers]
    for run in shown:
        features = [
            pictures.patch_features(run.encoder, _resized(mosaic, 4 * run.encoder.image_size)) for mosaic in mosaics
        ]
        columns[run.name] = pictures.joint_colors(features)
        own_size = np.stack([_resized(image, run.encoder.image_size) for image in found.images[numbers]])
        places = feature_map.positions(pictures.pooled(run.encoder, own_size))
        maps.append(feature_map.points(run.name, places, labels))
    strips = []
    for n, mosaic in enumerate(mosaics):
        figures = pictures.figure(f"mosaic {n + 1}", mosaic, "image")
        for name, colors in columns.items():
            figures += pictures.figure(f"mosaic {n + 1}, {name}", colors[n], name, "pixels")
        strips.append(f'<div class="strip">{figures}</div>')
    text = (
        f"The same images of {escape(shown[0].name)}'s data, and the first three principal components of the patch features"
        " of each run's last export as colours. Colours of different runs cannot be compared."
    )
    out = section("What the patches learned", text, *strips, kind="")
    if len({label for label in labels if label is not None}) > 1:
        words = f"t-SNE of the pooled features of the same {len(numbers):,} images; colours are classes."
        out += section("Maps of the features", words, *maps, columns="420px")
    return out


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """An image [C, S, S] at another size."""
    return image if image.shape[-1] == size else center(image.transpose(1, 2, 0), size)


def _curves(runs: list[Run]) -> str:
    """Losses of the runs with the same objective, and the scores of all runs during the training."""

    def lines(among: list[Run], values: Callable[[Run], tuple[list[float], list[float]]]) -> pictures.Series:
        return {run.name: values(run) for run in among}

    charts = []
    for objective in dict.fromkeys(run.recipe.objective.name for run in runs):
        same = [run for run in runs if run.recipe.objective.name == objective]
        charts.append(pictures.chart(f"loss of {objective}", lines(same, lambda run: series("loss", run.rows))))
    kinds = dict.fromkeys(
        (r["split"], r["protocol"], r["metric"])
        for run in runs
        for r in run.scores
        if r["metric"] in run_facts.MAIN_METRICS and r["split"] in ("val", "full", "train")
    )
    for kind in kinds:
        split, protocol, metric = kind
        is_share = run_facts.MAIN_METRICS[metric].endswith("%}")

        def values(run: Run, kind: tuple[str, str, str] = kind) -> tuple[list[float], list[float]]:
            chosen = [r for r in run.scores if (r["split"], r["protocol"], r["metric"]) == kind]
            return series("value", [r for r in chosen if r["model"] not in BASELINES])

        name = run_facts.PROTOCOL_NAMES.get(protocol, protocol)
        title = f"{name} {metric.replace('_', ' ')}, {run_facts.SPLITS[split]}"
        charts.append(pictures.chart(title, lines(runs, values), percent=is_share, points=True))
    return section(
        "Curves", "Losses of different objectives are not comparable, so each objective has its chart.", *charts
    )


def _recipes(runs: list[Run]) -> str:
    """The keys in which the resolved recipes differ."""
    flat = [dict(yaml_values.leaves(config.to_dict(run.recipe))) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    missing = object()
    lines = {
        key: [escape(mask_secrets(str(each[key]))) if key in each else "–" for each in flat]
        for key in keys
        if key.split(".")[0] not in NOT_COMPARED
        and any(each.get(key, missing) != flat[0].get(key, missing) for each in flat)
    }
    if not lines:
        return section("Recipes", "The recipes are equal.", kind="")
    return section("Recipes", "The keys in which the resolved recipes differ.", _table(runs, lines), kind="")
