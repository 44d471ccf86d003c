"""The report of a run: `write("runs/demo")` writes runs/demo/report.html, a single file that loads nothing else.

It reads the run folder, and the images that the recipe names. Sections without content are omitted.
"""

from __future__ import annotations

import math
import platform
import shlex
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.errors import DataError, UserError
from common.output import mask_secrets, printable
from eval import knn, linear, pictures, report_text, results, similarity_maps
from eval.features import open_encoder
from eval.report_captions import caption_section
from eval.report_curves import curves, folded_curves
from eval.report_images import image_sections
from eval.report_page import folded, page, section
from eval.sample_map import sample_map
from eval.tiers import tasks
from pretrain.interchange import run_facts
from pretrain.interchange.export_formats import opened_by
from pretrain.objectives.finder import is_file, purpose
from pretrain.parallel.device import scoring_device
from pretrain.recipes.recipe import Recipe, stored
from pretrain.run_folder.export_folders import exports
from pretrain.run_folder.jsonl_rows import read_rows

EXPLANATIONS = {
    "knn": f"The {knn.Config().k} nearest gallery images by cosine similarity vote with weight exp(similarity /"
    f" {knn.Config().temperature}).",
    "linear": f"One linear layer, {linear.Config().steps:,} steps; its learning rate is chosen on a held-out tenth of"
    " the gallery.",
}
CAPTIONS = {
    "reconstructions": "From left to right: the image, the patches that the encoder gets, and the image in which the"
    " masked patches are the model's predictions."
}
MAX_LOG_LINES = 12  # of log.txt that are shown


def write(run: str | Path, target: Path | None = None) -> Path:
    """Write the report to `target`, by default RUN/report.html, and return its path. Raises UserError if the folder is not a run folder, or has no metrics or no export yet."""
    run = Path(run)
    recipe, rows, exported = open_run(run)
    device = scoring_device(recipe.eval.device, recipe.device)
    last = open_encoder(str(exported[max(exported)]), recipe.eval.image_size, device)[0]
    scores = read_rows(run / "results.jsonl")
    parts = [_header(run, recipe, rows, last, scores), _scores(recipe, scores), report_text.scores(scores)]
    try:
        if recipe.model.reads == "image":
            parts += [image_sections(recipe, exported, last, device), caption_section(recipe, last)]
        else:
            parts.append(sample_map(recipe, exported, last, device))
    except DataError as error:  # the data were moved, or are on another machine
        parts.append(f'<p class="soft">The pictures of features are missing: {escape(str(error))}</p>')
    parts += [_objective_pictures(run), report_text.samples(read_rows(run / "samples.jsonl"))]
    parts += [curves(rows, scores), *folded_curves(rows), _rerun_section(run)]
    return page(target or run / "report.html", run.resolve().name, *parts, script=similarity_maps.SCRIPT)


def open_run(run: Path) -> tuple[Recipe, list[dict], dict[int, Path]]:
    """(recipe, rows of metrics.jsonl, {step: folder of an export}) of a run. Raises UserError as `write`."""
    recipe, rows, exported = stored(run), read_rows(run / "metrics.jsonl"), exports(run)
    for entries, name in ((rows, "metrics (metrics.jsonl)"), (exported, "export (export/STEP)")):
        if not entries:
            raise UserError(
                f"{run}: has no {name} yet, so there is nothing to report; train it first: unlabeled train {run}"
            )
    return recipe, rows, exported


def status(recipe: Recipe, rows: list[dict]) -> str:
    """Chips that say how far a run is, and whether it has collapsed."""
    done = min(rows[-1]["step"] + 1, recipe.steps)
    if done >= recipe.steps:
        text = f'<span class="chip done">finished: {done:,} steps</span>'
    else:
        text = f'<span class="chip">step {done:,} of {recipe.steps:,}</span>'
    if verdict := run_facts.collapse(recipe, rows):
        text += f' <span class="chip bad">collapsed</span><p class="down">This run {escape(verdict)}.</p>'
    return text


def _header(run: Path, recipe: Recipe, rows: list[dict], encoder: Any, scores: list[dict]) -> str:
    """What was trained on what, whether it learned, and what to do next."""
    parameters = sum(p.numel() for p in encoder.backbone.parameters())
    facts = run_facts.facts(run, recipe, rows, parameters)
    wide = ' class="wide"'
    listed = "".join(
        f"<div{wide if key == 'training data' else ''}><dt>{key}</dt><dd>{escape(value)}</dd></div>"
        for key, value in facts.items()
    )
    about = "" if is_file(recipe.objective.name) else escape(purpose(recipe.objective.name))
    done = min(rows[-1]["step"] + 1, recipe.steps)
    return (
        f"<h1>{escape(run.resolve().name)}</h1>{status(recipe, rows)}<p>{about}</p>"
        f'<dl class="card">{listed}</dl><div class="learned"><h2>Did it learn?</h2>{learned(recipe, scores)}</div>'
        f"{_next_steps(run, recipe, done)}"
    )


def learned(recipe: Recipe, scores: list[dict]) -> str:
    """A sentence with the main score of each protocol, compared with the untrained network and with raw inputs."""
    tests = [row for row in scores if row.get("split") == "test"]
    task = tasks(recipe).get("test")
    of_recipe = [r for r in tests if task and (r.get("gallery"), r.get("query")) == (task.gallery, task.query)]
    others = [row for row in scores if row.get("split") != "test"]
    split, found = run_facts.best_evidence([*(of_recipe or tests), *others])
    out = ""
    for finding in found:
        text = f"<b>{escape(finding.title)}: {finding.value}</b>{escape(finding.scored(split))}"
        comparisons = [
            f'<span class="{_direction(finding, floor)}">{finding.comparison(floor)}</span>' for floor in finding.floors
        ]
        out += f'<p class="lead">{", ".join([text, " and ".join(comparisons)] if comparisons else [text])}.</p>'
    if split == "train":
        out += (
            '<p class="soft">These numbers need no labels. They tell a collapse from features that use their dimensions;'
            " only a score on labelled data tells whether the features are useful.</p>"
        )
    return out or (
        "<p>Nothing has been scored, so the loss below is the only sign. A score on labelled data, or"
        " <code>eval.health=1024</code> without labels, would tell.</p>"
    )


def _next_steps(run: Path, recipe: Recipe, done: int) -> str:
    """A card with commands that continue the run or use its results."""
    name, folder = shlex.quote(str(run)), f"{run}/export/{max(exports(run))}"
    quoted = shlex.quote(folder)
    steps = []
    if done < recipe.steps:
        steps.append(("continue the run", f"unlabeled train {name}"))
    if recipe.model.reads == "image" or not recipe.model.writes:
        steps.append(
            ("score it on your labelled data", f"unlabeled eval {quoted} knn linear gallery=SHARDS query=SHARDS")
        )
    if recipe.model.writes:
        steps.append(("generate text", f'unlabeled generate {name} "PROMPT"'))
    steps.append(("export the weights", f"unlabeled export {name} FOLDER"))
    steps.append(("use it in Python", opened_by(Path(folder))[1].removeprefix("open it with ")))
    if not recipe.eval.test and recipe.model.reads != "tokens":
        steps.append(("score the exports of the next run", "eval.gallery=SHARDS eval.val=SHARDS eval.test=SHARDS"))
    listed = "".join(f"<p><small>{title}</small><br><code>{escape(command)}</code></p>" for title, command in steps)
    return f'<div class="card next"><h3>What to do next</h3>{listed}</div>'


def _direction(finding: run_facts.Finding, floor: str) -> str:
    """The CSS class for a distance from a floor."""
    if not finding.is_certain(floor):
        return "soft"
    return "up" if finding.gain(floor) > 0 else "down"


# ---------------------------------------------------------------- scores
def _scores(recipe: Recipe, rows: list[dict]) -> str:
    """The test accuracy on the data that the recipe names: a card for each protocol."""
    tables = _test_scores(recipe, rows)
    cards = [
        _score_card(name, table) for name, table in tables.items() if any(metric == "accuracy" for _, metric in table)
    ]
    if not cards:
        return ""
    first_table = next(iter(tables.values()))
    row = next(iter(first_table.values()))
    count, unit = row.get("count", 0), row.get("unit", "images")
    raw = {"texts": "raw bytes", "recordings": "log-mel statistics"}.get(unit, "raw pixels")
    text = (
        f"Test accuracy on {count:,} {unit} with a gallery of {row.get('gallery_count', 0):,} labelled {unit}. Encoders"
        f" are frozen; {raw} and the untrained network are baselines. Balanced: the mean of the classes' accuracies."
        f" ±: the 95% interval for {count:,} test {unit}."
    )
    return section("Scores", text, *cards, columns="400px")


def _test_scores(recipe: Recipe, rows: list[dict]) -> dict[str, dict[tuple[str, str], dict]]:
    """{protocol: {(model, metric): row}} on the test data that the recipe names.

    The last export of a model is used, and the newest of several rows for the same export.
    """
    task = tasks(recipe).get("test")
    gallery, query = (task.gallery, task.query) if task is not None else ([], [])
    out: dict[str, dict[tuple[str, str], dict]] = {}
    for row in sorted(rows, key=lambda r: r["step"]):
        if (row.get("split"), row.get("gallery"), row.get("query")) == ("test", gallery, query):
            out.setdefault(row["protocol"], {})[row["model"], row["metric"]] = row
    return out


def _accuracies(table: dict[tuple[str, str], dict]) -> dict[str, float]:
    """{model: accuracy} of a protocol's table."""
    return {model: table[model, "accuracy"]["value"] for model in results.MODELS if (model, "accuracy") in table}


def _score_card(protocol: str, table: dict[tuple[str, str], dict]) -> str:
    """A card with the accuracies of all models by one protocol. `table`: {(model, metric): row}."""
    accuracies = _accuracies(table)
    highest = max(*accuracies.values(), 1e-9)
    lines, gains = "", []
    for model, accuracy in accuracies.items():
        count = max(1, table[model, "accuracy"].get("count", 0))
        error = 196 * math.sqrt(max(0.0, accuracy * (1 - accuracy)) / count)  # 1.96 standard errors, in points
        bar = f'<span class="bar"><i style="width:{accuracy / highest:.1%}"></i></span>'
        balanced = table.get((model, "balanced_accuracy"), {}).get("value")
        lines += (
            f'<tr class="{model}"><th>{model}</th>'
            f"<td><b>{accuracy:.1%}</b> <small>± {error:.1f}</small>{bar}</td>"
            f"<td>{'' if balanced is None else f'{balanced:.1%}'}</td></tr>"
        )
        if model != "pretrained" and "pretrained" in accuracies:
            gain = 100 * (accuracies["pretrained"] - accuracy)
            text = f"{gain:+.1f}".replace("-", "−")
            gains.append(f'<b class="{"up" if gain >= 0 else "down"}">{text}</b> points over {model}')
    title = f"<h3>{'k-NN' if protocol == 'knn' else escape(protocol)}<span>{' · '.join(gains)}</span></h3>"
    rows = f"<table><tr><th></th><th>accuracy</th><th>balanced</th></tr>{lines}</table>"
    notes = "".join(f'<p class="down">{escape(note)}</p>' for note in results.notes([*table.values()]))
    return f'<div class="card">{title}{rows}{notes}<small>{EXPLANATIONS.get(protocol, "")}</small></div>'


# ---------------------------------------------------------------- pictures and recipe
def _objective_pictures(run: Path) -> str:
    """The first, the middle and the last picture of each kind that the objective has drawn."""
    by_kind: dict[str, list[Path]] = {}
    for path in sorted((run / "pictures").glob("*-*.png")):
        by_kind.setdefault(path.stem.rpartition("-")[0], []).append(path)
    out = ""
    for name, paths in by_kind.items():
        figures = []
        for path in sorted({paths[0], paths[len(paths) // 2], paths[-1]}):
            try:
                with Image.open(path) as picture:
                    url = pictures.data_url(np.asarray(picture.convert("RGB")))
                caption = f"step {int(path.stem.rpartition('-')[2]):,}"
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # a damaged file, or not a picture
                continue
            figures.append(f'<figure><img alt="{escape(name)}" src="{url}"><figcaption>{caption}</figcaption></figure>')
        if figures:
            text = CAPTIONS.get(name, "Drawn by the objective.")
            out += section(escape(name.capitalize()), text, *figures, columns="200px", kind="grid drawn")
    return out


def _rerun_section(run: Path) -> str:
    command = f"<code>unlabeled train {escape(shlex.quote(str(run)))}</code>"
    text = f"{command} continues this run; with <code>overwrite=true</code> it starts again."
    yaml = escape(mask_secrets((run / "recipe.yaml").read_text()))
    recipe = folded("The resolved recipe", f"<pre>{yaml}</pre>")
    log = (run / "log.txt").read_text(errors="replace") if (run / "log.txt").is_file() else ""
    start = escape(mask_secrets(printable("\n".join(log.splitlines()[:MAX_LOG_LINES]), keep="\n\t")))
    data = "".join(f"<p>{escape(line.replace('`', ''))}</p>" for line in run_facts.data_sets(run))
    system = folded(
        "System and data",
        f"<div>{data}<p>This page: Python {platform.python_version()}, torch {torch.__version__}.</p></div>",
        f"<div><small>the first lines of log.txt</small><pre>{start}</pre></div>" if start else "",
    )
    return section("How to run it again", text, recipe, system, kind="")
