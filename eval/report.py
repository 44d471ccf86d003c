"""The report of a run: `write("runs/demo")` writes runs/demo/report.html, a single file that loads nothing else.

It reads the run folder, and the images that the recipe names. Sections without content are omitted.
"""

from __future__ import annotations

import math
import platform
import re
import shlex
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.errors import DataError, UserError
from common.output import mask_secrets
from data_pipeline.shards.samples import Samples
from eval import knn, linear, pictures, report_text, results
from eval.features import Encoder, open_encoder
from eval.report_curves import curves
from eval.report_style import STYLE
from eval.report_text import section
from eval.tiers import tasks
from pretrain import collapse_monitor
from pretrain.interchange.export_formats import opened_by
from pretrain.objectives.finder import is_file, purpose
from pretrain.parallel.device import scoring_device
from pretrain.recipes.recipe import Recipe, stored
from pretrain.run_folder.export_folders import exports
from pretrain.run_folder.jsonl_rows import read_rows

MODELS = ("pixels", "clip_pixels", "bytes", "log_mel", "untrained", "pretrained")
# The report uses at most so many test and gallery images, evenly spaced over the sets.
MAX_TEST_IMAGES, MAX_GALLERY_IMAGES = 512, 1536
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
UNITS = {
    "image": "images",
    "clip": "videos",
    "tokens": "rows",
    "audio": "recordings",
}  # the word for samples, for each part that a model can read


def write(run: str | Path) -> Path:
    """Write RUN/report.html. Raises UserError if the folder is not a run folder, or has no metrics or no export yet."""
    run = Path(run)
    recipe, rows, exported = stored(run), read_rows(run / "metrics.jsonl"), exports(run)
    for entries, name in ((rows, "metrics (metrics.jsonl)"), (exported, "export (export/STEP)")):
        if not entries:
            raise UserError(
                f"{run}: has no {name} yet, so there is nothing to report; train it first: unlabeled train {run}"
            )
    device = scoring_device(recipe.eval.device, recipe.device)
    encoders = {
        step: open_encoder(str(exported[step]), recipe.eval.image_size, device)[0]
        for step in (min(exported), max(exported))
    }
    scores = read_rows(run / "results.jsonl")
    backbone = encoders[max(encoders)].backbone
    parts = [_header(run, recipe, rows, backbone, scores), _scores(recipe, scores), report_text.scores(scores)]
    parts += [curves(rows, scores), report_text.samples(read_rows(run / "samples.jsonl"))]
    try:
        parts.append(_image_sections(recipe, encoders) if recipe.model.reads == "image" else "")
    except DataError as error:  # the data were moved, or are on another machine
        parts.append(f'<p class="soft">The pictures of patches and of neighbours are missing: {escape(str(error))}</p>')
    parts += [_objective_pictures(run), _rerun_section(run)]
    partial = run / ".report.html"
    partial.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.resolve().name)} · unlabeled</title><style>{STYLE}</style>"
        f"<main>{''.join(parts)}</main></html>\n",
        encoding="utf-8",
    )
    return partial.replace(run / "report.html")


def _header(run: Path, recipe: Recipe, rows: list[dict], backbone: Any, scores: list[dict]) -> str:
    """The title with the status of the run, facts about it, its scores in a sentence, and what to do next."""
    log = (run / "log.txt").read_text(errors="replace") if (run / "log.txt").is_file() else ""
    # The last line of the log that describes a start of the run.
    starts = re.findall(r" trained\), (\d+) samples, batch [\d.]+(?: s)?, (.+?),", log)
    samples, precision = starts[-1] if starts else ("", recipe.precision)
    done = min(rows[-1]["step"] + 1, recipe.steps)
    facts = {
        "objective": recipe.objective.name,
        "encoder": recipe.model.name,
        "its parameters": f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M",
        f"training {UNITS[recipe.model.reads]}": samples and f"{int(samples):,}",
        "steps × batch": f"{recipe.steps:,} × {recipe.data.batch_text}",
        "precision": precision,
        "training time": _duration(_training_seconds(rows, recipe.data.batch_size)),
    }
    listed = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value)
    if done >= recipe.steps:
        status = f'<span class="chip done">finished: {done:,} steps</span>'
    else:
        status = f'<span class="chip">step {done:,} of {recipe.steps:,}</span>'
    if verdict := collapse_monitor.verdict(rows, recipe.objective.assignments(), recipe.optim.lr.warmup_steps()):
        status += f' <span class="chip bad">collapsed</span><p class="down">This run {escape(verdict)}.</p>'
    about = "" if is_file(recipe.objective.name) else escape(purpose(recipe.objective.name))
    return (
        f'<h1>{escape(run.resolve().name)}</h1>{status}<p>{about}</p><dl class="card">{listed}</dl>'
        f"{_summary(recipe, scores)}{_next_steps(run, recipe, done)}"
    )


def _training_seconds(rows: list[dict], batch: int) -> float:
    """The time that all steps took. `rows`: of metrics.jsonl, one for each step. The speed in a row is the mean over the
    steps since the previous row with a speed; it states their number of samples if that varies."""
    with_speed = [i for i, row in enumerate(rows) if row.get("samples_per_second")]
    return sum(
        rows[i].get("samples", (i - previous) * batch) / rows[i]["samples_per_second"]
        for previous, i in zip([-1, *with_speed], with_speed, strict=False)
    )


def _duration(seconds: float) -> str:
    """Seconds as text, in seconds, minutes or hours."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _summary(recipe: Recipe, rows: list[dict]) -> str:
    """One sentence with the score for each protocol, compared with the untrained network and raw pixels."""
    sentences = []
    for name, table in _test_scores(recipe, rows).items():
        accuracies = _accuracies(table)
        if "pretrained" in accuracies:
            sentences.append(_score_sentence("k-NN" if name == "knn" else name, accuracies, next(iter(table.values()))))
    bits = {row["model"]: row["value"] for row in rows if (row["metric"], row["split"]) == ("bits_per_byte", "test")}
    if "pretrained" in bits:
        text = f"<b>{bits['pretrained']:.3f} bits per byte</b> on test text"
        gain = bits["untrained"] - bits["pretrained"] if "untrained" in bits else math.nan
        sentences.append(f"{text}, {gain:.3f} below the untrained network." if gain > 0 else f"{text}.")
    return "".join(f'<p class="lead">{text}</p>' for text in sentences)


def _score_sentence(protocol: str, accuracies: dict[str, float], row: dict) -> str:
    """The accuracy of the pretrained model, and its gains over the baselines. `accuracies`: by model."""
    baselines = {
        **{"untrained": "the untrained network", "pixels": "raw pixels", "bytes": "raw bytes"},
        "clip_pixels": "raw pixels",
        "log_mel": "log-mel statistics",
    }
    comparisons = []
    for model, name in baselines.items():
        gain = 100 * (accuracies["pretrained"] - accuracies.get(model, math.nan))
        kind, word = ("up", "above") if gain > 0 else ("down", "below")
        if math.isfinite(gain):
            comparisons.append(f'<span class="{kind}">{abs(gain):.1f} points {word} {name}</span>')
    text = f"<b>{escape(protocol)}: {accuracies['pretrained']:.1%}</b>"
    text += f" of {row.get('count', 0):,} test {row.get('unit', 'images')}"
    return f"{text}, {' and '.join(comparisons)}." if comparisons else f"{text}."


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
    return {model: table[model, "accuracy"]["value"] for model in MODELS if (model, "accuracy") in table}


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


# ---------------------------------------------------------------- images
def _image_sections(recipe: Recipe, encoders: dict[int, Encoder]) -> str:
    """The sections on patches and on nearest neighbours. They use labelled test and gallery images if the recipe names
    them, and otherwise training images."""
    cfg, last = recipe.eval, encoders[max(encoders)]
    if last.channels != 3:
        return ""  # a web page can show only images of three channels
    gallery_shards = cfg.test_gallery or cfg.gallery
    if cfg.test and gallery_shards:
        images, labels = pictures.load_some(Samples(cfg.test), MAX_TEST_IMAGES, last.image_size)
        gallery = Samples(gallery_shards)
        gallery_images, gallery_labels = pictures.load_some(gallery, MAX_GALLERY_IMAGES, last.image_size)
        neighbours = _neighbour_section(last, images, labels, gallery_images, gallery_labels, len(gallery))
    else:
        train = Samples(recipe.data.train or recipe.data.mix[0].shards)
        images, _ = pictures.load_some(train, MAX_TEST_IMAGES, last.image_size)
        labels = [None] * len(images)
        neighbours = _neighbour_section(last, images, labels, images, labels, len(train))
    return _patch_section(images, labels, encoders) + neighbours


def _neighbour_section(
    encoder: Encoder,
    images: np.ndarray,
    labels: pictures.Labels,
    gallery_images: np.ndarray,
    gallery_labels: pictures.Labels,
    gallery_count: int,
) -> str:
    """The section with some of the images and their nearest neighbours in the gallery, which may be the images
    themselves. `gallery_count`: the number of images in the gallery, of which `gallery_images` are a part."""
    queries = list(dict.fromkeys(number for (number,) in pictures.spread(labels, 8, 1)))
    similarity = pictures.similarity(encoder, images[queries], gallery_images)  # [Q, N]
    candidates = len(gallery_images)
    if gallery_images is images:  # an image is not its own neighbour
        similarity[range(len(queries)), queries] = -2
        candidates -= 1
    cards, verdicts = [], []
    nearest = similarity.topk(min(6, candidates)).indices.tolist()
    for query, neighbours in zip(queries, nearest, strict=True):
        thumbnails = _thumbnail(images[query], labels[query])
        for i in neighbours:
            verdicts.append(_verdict(labels[query], gallery_labels[i]))
            thumbnails += _thumbnail(gallery_images[i], gallery_labels[i], verdicts[-1])
        cards.append(f'<div class="card near">{thumbnails}</div>')
    text = (
        "A query is on the left. Beside it are the six images whose pooled features have the largest cosine similarity"
        f" to its features, among {len(gallery_images):,} of {gallery_count:,} gallery images."
    )
    text += f" {verdicts.count('right')} of {len(verdicts)} are of the query's class." if any(verdicts) else ""
    return section("Nearest neighbours", text, *cards, columns="420px")


def _verdict(query: str | None, neighbour: str | None) -> str:
    """Whether a neighbour has the query's label: "right", "wrong", or "" if a label is missing."""
    if query is None or neighbour is None:
        return ""
    return "right" if query == neighbour else "wrong"


def _thumbnail(image: np.ndarray, label: str | None, verdict: str = "") -> str:
    """A small image with its label and a mark for the verdict."""
    name, mark = escape(label or ""), {"right": "✓ ", "wrong": "✗ "}.get(verdict, "")
    caption = f'<figcaption title="{name}">{mark}{name}</figcaption>' if name else ""
    return f'<figure class="{verdict}"><img alt="{name}" src="{pictures.data_url(image, 96)}">{caption}</figure>'


def _patch_section(images: np.ndarray, labels: pictures.Labels, encoders: dict[int, Encoder]) -> str:
    """The section with mosaics of images, and their patch features before and after the training as colours."""
    groups = pictures.spread(labels, 12, 4)
    mosaics = [pictures.mosaic(images[np.concatenate(groups[i : i + 4])]) for i in (0, 4, 8)]
    columns = {"image": [pictures.data_url(m) for m in mosaics]}
    for step, encoder in encoders.items():
        colors = pictures.pca_colors(np.stack([pictures.patch_features(encoder, m) for m in mosaics]))
        columns[f"pretrained, step {step:,}" if step else "untrained"] = [pictures.data_url(c) for c in colors]
    cells = "".join(f"<b>{name}</b>" for name in columns)
    for i in range(len(mosaics)):
        cells += "".join(f'<img alt="mosaic {i + 1}, {name}" src="{urls[i]}">' for name, urls in columns.items())
        rows = [{labels[number] for number in group} for group in groups[4 * i : 4 * i + 4]]  # labels in each row
        classes = [label for row in rows if len(row) == 1 for label in row if label]
        if len(classes) == 4:
            cells += f"<figcaption>rows: {escape(', '.join(classes))}</figcaption>"
    text = (
        "Each mosaic of 4 × 4 images is one input of the encoder. The first three principal components (PCA) of the"
        " patch features of all mosaics are shown as red, green and blue: patches of similar colour have similar"
        " features. Colours in different columns cannot be compared."
    )
    grid = f'<div class="mosaics" style="grid-template-columns:repeat({len(columns)},1fr)">{cells}</div>'
    return section("What the patches learned", text, grid, kind="")


def _objective_pictures(run: Path) -> str:
    """The first and the last picture of each kind that the objective has drawn."""
    by_kind: dict[str, list[Path]] = {}
    for path in sorted((run / "pictures").glob("*-*.png")):
        by_kind.setdefault(path.stem.rpartition("-")[0], []).append(path)
    out = ""
    for name, paths in by_kind.items():
        figures = []
        for path in sorted({paths[0], paths[-1]}):
            try:
                with Image.open(path) as picture:
                    url = pictures.data_url(np.asarray(picture.convert("RGB")))
                caption = f"step {int(path.stem.rpartition('-')[2]):,}"
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # a damaged file, or not a picture
                continue
            figures.append(f'<figure><img alt="{escape(name)}" src="{url}"><figcaption>{caption}</figcaption></figure>')
        if figures:
            text = CAPTIONS.get(name, "Drawn by the objective.")
            out += section(escape(name.capitalize()), text, *figures, columns="150px", kind="grid drawn")
    return out


def _rerun_section(run: Path) -> str:
    command = f"<code>unlabeled train {escape(shlex.quote(str(run)))}</code>"
    text = f"{command} continues this run; with <code>overwrite=true</code> it starts again."
    yaml = escape(mask_secrets((run / "recipe.yaml").read_text()))
    recipe = f'<details class="card"><summary>The resolved recipe</summary><pre>{yaml}</pre></details>'
    return section(
        "How to run it again",
        f"{text} This page: Python {platform.python_version()}, torch {torch.__version__}.",
        recipe,
    )
