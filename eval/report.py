"""The report of a run: `write("runs/demo")` makes runs/demo/report.html, one file that needs no network and no other file.

It reads the run folder, and the images that the recipe names. A section with nothing to show is left out.
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

from data_pipeline.shards import Samples
from data_pipeline.storage import DataError
from eval import knn, linear, pictures, report_text
from eval.features import Encoder, open_encoder
from eval.report_text import section
from pretrain.errors import UserError
from pretrain.objective import purpose
from pretrain.recipe import Recipe, is_text, load
from pretrain.run_folder import exports, read_rows

MODELS = ("pixels", "bytes", "untrained", "pretrained")
TRIED, GALLERY = (
    512,
    1536,
)  # of the test and the gallery images at most so many, evenly spaced, are looked at for the pictures
NO_TERM = ("step", "loss", "grad_norm", "lr", "samples_per_second", "data_share", "loop_share")
HOW = {
    "knn": f"The {knn.Config().k} nearest gallery images by cosine similarity vote with weight exp(similarity / {knn.Config().temperature}).",
    "linear": f"One linear layer, {linear.Config().steps:,} steps; its learning rate is chosen on a held-out tenth of the gallery.",
}
ACCURACIES = ("accuracy", "balanced_accuracy")
CAPTIONS = {
    "reconstructions": "From left to right: the image, the patches that the encoder sees, and the image with the hidden patches painted in."
}
STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#171a21;--soft:#626b7a;--line:#e3e6ec;--s0:#4a4ee0;--s1:#d9772b;--grey:#98a1b0;--good:#14894e;--bad:#d23b3b}
@media(prefers-color-scheme:dark){:root{--bg:#0f1116;--card:#181b22;--ink:#e8eaf0;--soft:#99a2b2;--line:#2a2f3a;--s0:#8d92ff;--s1:#f0a060;
--grey:#6b7484;--good:#3fc57f;--bad:#ff6f6f}}
*{box-sizing:border-box} body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:auto;padding:36px 18px 64px} h1{font-size:2.1rem;line-height:1.2;margin:0 0 .2em;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:48px 0 4px} h3{font-size:.95rem;margin:0;display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1em}
p{margin:.4em 0;max-width:90ch} h3 span{font-weight:400} .soft,figcaption,small,dt,th,h3 span{color:var(--soft)} .soft{font-size:.92rem}
.chip{display:inline-block;border-radius:9px;padding:1px 10px;font-size:.85rem;font-weight:600;color:var(--card);background:var(--s1)}
.done{background:var(--good)} .card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;min-width:0}
.grid{display:grid;gap:14px;margin-top:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least)),1fr))} dd{margin:0;font-weight:600}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:12px;margin:18px 0 0} dt,th{font-size:.82rem}
table{border-collapse:collapse;width:100%;margin:10px 0 6px;font-variant-numeric:tabular-nums} th{font-weight:400;text-align:left}
td,th{padding:5px 10px 5px 0} td:nth-child(2){width:62%} td:last-child,th:last-child{text-align:right;padding-right:0}
.bar,i{display:block;height:8px;border-radius:4px;margin-top:2px;background:var(--line)} i{margin:0;background:var(--grey)}
.pretrained i{background:var(--s0)} .pretrained th{color:var(--ink);font-weight:650} figure{margin:0;min-width:0}
.up,.right figcaption{color:var(--good)} .down,.wrong figcaption{color:var(--bad)} .s0{color:var(--s0)} .s1{color:var(--s1)}
svg{display:block;width:100%;margin-top:8px;font-size:12.5px} text{fill:var(--soft)} line{stroke:var(--line)} circle{fill:currentColor}
polyline{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round} .raw{stroke-width:1;opacity:.28} .drawn{max-width:640px}
img{display:block;width:100%;border-radius:6px} .drawn img,.mosaics img+img{image-rendering:pixelated} figcaption{font-size:.82rem;margin-top:3px}
.mosaics{display:grid;gap:10px;margin-top:14px} .mosaics figcaption{grid-column:1/-1;margin-top:-6px} .near img{aspect-ratio:1;outline-offset:-2px}
.near{display:grid;grid-template-columns:1.1fr repeat(6,1fr);gap:6px;padding:12px} .near figure:first-child{margin-right:8px}
.near figcaption{font-size:.72rem;white-space:nowrap;overflow:hidden;text-overflow:ellipsis} .right img{outline:3px solid var(--good)}
.wrong img{outline:3px solid var(--bad)} summary{cursor:pointer;font-weight:600} code{overflow-wrap:anywhere} pre{overflow:auto;font-size:.82rem}
"""


def write(run: str | Path) -> Path:
    """Write RUN/report.html. UserError where the folder is no run, or has no metrics or no export yet."""
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{run}: is no run folder (recipe.yaml is missing); name a folder that `unlabeled train` wrote, such as runs/demo"
        )
    recipe, rows, exported = load(run), read_rows(run / "metrics.jsonl"), exports(run)
    for found, what in ((rows, "metrics (metrics.jsonl)"), (exported, "export (export/STEP)")):
        if not found:
            raise UserError(
                f"{run}: has no {what} yet, so there is nothing to report; train it first: unlabeled train {run}"
            )
    encoders = {
        step: open_encoder(str(exported[step]), recipe.eval.image_size)[0] for step in (min(exported), max(exported))
    }
    scores = read_rows(run / "results.jsonl")
    backbone = encoders[max(encoders)].backbone
    parts = [_head(run, recipe, rows, backbone), _scores(recipe, scores), report_text.scores(scores)]
    parts += [_curves(rows, scores), report_text.samples(read_rows(run / "samples.jsonl"))]
    try:
        parts.append("" if is_text(recipe) else _learned(recipe, encoders))
    except DataError as error:  # the data has moved, or this is another machine
        parts.append(f'<p class="soft">Pictures of patches and of neighbours are left out: {escape(str(error))}</p>')
    parts += [_drawn(run), _foot(run)]
    partial = run / ".report.html"
    partial.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(run.resolve().name)} · unlabeled</title><style>{STYLE}</style>'
        f"<main>{''.join(parts)}</main></html>\n",
        encoding="utf-8",
    )
    return partial.replace(run / "report.html")


def _head(run: Path, recipe: Recipe, rows: list[dict], backbone: Any) -> str:
    log = (run / "log.txt").read_text(errors="replace") if (run / "log.txt").is_file() else ""
    samples, precision = (re.findall(r" trained\), (\d+) samples, batch \d+, (.+?),", log) or [("", recipe.precision)])[
        -1
    ]
    flushed = [
        i for i, row in enumerate(rows) if row.get("samples_per_second")
    ]  # these rows speak for themselves and those since the last
    seconds = sum(
        (i - before) * recipe.data.batch / rows[i]["samples_per_second"]
        for before, i in zip([-1, *flushed], flushed, strict=False)
    )
    minutes, done = seconds / 60, min(rows[-1]["step"] + 1, recipe.steps)
    facts = {
        "objective": recipe.objective.name,
        "encoder": recipe.model.name,
        "its parameters": f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M",
        "training rows" if is_text(recipe) else "training images": samples and f"{int(samples):,}",
        "steps × batch": f"{recipe.steps:,} × {recipe.data.batch:,}",
        "precision": precision,
        "training time": f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes:.0f} min"
        if minutes < 120
        else f"{minutes / 60:.1f} h",
    }
    listed = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value)
    status = (
        f'chip done">finished: {done:,} steps' if done >= recipe.steps else f'chip">step {done:,} of {recipe.steps:,}'
    )
    text = escape(purpose(recipe.objective.name))
    return (
        f'<h1>{escape(run.resolve().name)}</h1><span class="{status}</span><p>{text}</p><dl class="card">{listed}</dl>'
    )


# ---------------------------------------------------------------- scores
def _scores(recipe: Recipe, rows: list[dict]) -> str:
    """Test accuracy on the recipe's own data; of several exports the last, of several rows the newest."""
    gallery, query = recipe.eval.test_gallery or recipe.eval.gallery, recipe.eval.test
    tables: dict[str, dict[tuple[str, str], dict]] = {}  # protocol → (model, metric) → row
    for row in sorted(rows, key=lambda r: r["step"]):
        if (row.get("split"), row.get("gallery"), row.get("query")) == ("test", gallery, query):
            tables.setdefault(row["protocol"], {})[row["model"], row["metric"]] = row
    cards = [_card(name, table) for name, table in tables.items() if any(metric == "accuracy" for _, metric in table)]
    if not cards:
        return ""
    row = next(iter(next(iter(tables.values())).values()))
    count, unit = row["count"], row.get("unit", "images")
    known = f" and a gallery of {row['gallery_count']:,} labelled {unit} to learn from"
    floor = "bytes" if unit == "texts" else "pixels"
    text = f"Test accuracy on {count:,} {unit}{known}. Encoders are frozen, and {floor} and the untrained network are the floors to beat."
    return section(
        "Scores",
        f"{text} Balanced: the mean of the classes' accuracies. ±: the 95% interval that follows from the number of test {unit}.",
        *cards,
        columns="400px",
    )


def _card(protocol: str, table: dict[tuple[str, str], dict]) -> str:
    value = {model: table[model, "accuracy"]["value"] for model in MODELS if (model, "accuracy") in table}
    lines, gains = "", []
    for model, v in value.items():
        balanced = table.get((model, "balanced_accuracy"), {}).get("value")
        error = 196 * math.sqrt(v * (1 - v) / max(1, table[model, "accuracy"]["count"]))
        bar = f'<span class="bar"><i style="width:{v / max(*value.values(), 1e-9):.1%}"></i></span>'
        lines += f'<tr class="{model}"><th>{model}</th><td><b>{v:.1%}</b> <small>± {error:.1f}</small>{bar}</td>'
        lines += f"<td>{'' if balanced is None else f'{balanced:.1%}'}</td></tr>"
        if model != "pretrained" and (gain := 100 * (value.get("pretrained", math.nan) - v)) == gain:
            gains.append(
                f'<b class="{"up" if gain >= 0 else "down"}">{gain:+.1f}</b> points over {model}'.replace(">-", ">−")
            )
    title = f"<h3>{'k-NN' if protocol == 'knn' else escape(protocol)}<span>{' · '.join(gains)}</span></h3>"
    table_of = f"<table><tr><th></th><th>accuracy</th><th>balanced</th></tr>{lines}</table>"
    return f'<div class="card">{title}{table_of}<small>{HOW.get(protocol, "")}</small></div>'


# ---------------------------------------------------------------- curves
def _curves(rows: list[dict], scores: list[dict]) -> str:
    def series(key: str, among: list[dict] = rows) -> tuple[list[float], list[float]]:
        found = {r["step"]: r[key] for r in among if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])}
        return sorted(found), [found[step] for step in sorted(found)]

    charts = [pictures.chart("loss", {"": series("loss")})]
    bits = [r for r in scores if (r.get("split"), r["metric"]) == ("val", "bits_per_byte")]
    charts.append(pictures.chart("bits per byte on val", {"": series("value", bits)}, points=True))
    val = [
        r
        for r in scores
        if r.get("split") == "val" and r["model"] not in ("pixels", "bytes") and r["metric"] in ACCURACIES
    ]
    for protocol in dict.fromkeys(r["protocol"] for r in val):
        own = {m: [r for r in val if (r["protocol"], r["metric"]) == (protocol, m)] for m in ACCURACIES}
        lines = {metric.partition("_")[0]: series("value", some) for metric, some in own.items()}
        charts.append(
            pictures.chart(f"{'k-NN' if protocol == 'knn' else protocol} on val", lines, percent=True, points=True)
        )
    for key in [*dict.fromkeys(key for row in rows for key in row if key not in NO_TERM), "grad_norm"]:
        charts.append(pictures.chart(key.replace("_", " "), {"": series(key)}))
    charts.append(pictures.chart("learning rate", {"": series("lr")}, smooth=False))
    charts.append(pictures.chart("samples per second", {"": series("samples_per_second")}, zero=True))
    charts.append(
        pictures.chart(
            "share of time",
            {"waiting for data": series("data_share"), "loop": series("loop_share")},
            percent=True,
            zero=True,
        )
    )
    return section(
        "Curves",
        "By step: faint what was measured (spikes beyond the frame are cut), strong its moving mean; at the top right that mean's last value.",
        *charts,
    )


# ---------------------------------------------------------------- images
def _learned(recipe: Recipe, encoders: dict[int, Encoder]) -> str:
    """Patches and neighbours: of the labelled test and gallery images where the recipe names such, else of training images."""
    cfg, last = recipe.eval, encoders[max(encoders)]
    if last.channels != 3:
        return ""  # nothing that a page can show as it is
    known = cfg.test_gallery or cfg.gallery
    labelled = bool(cfg.test and known)
    train = recipe.data.train or recipe.data.mix[0].shards
    samples = Samples(cfg.test if labelled else train)
    gallery = Samples(known) if labelled else samples
    images, labels = pictures.load_some(samples, TRIED, last.image_size)
    labels = labels if labelled else [None] * len(images)
    others, names = pictures.load_some(gallery, GALLERY, last.image_size) if labelled else (images, labels)
    asked = list(dict.fromkeys(number for (number,) in pictures.spread(labels, 8, 1)))
    near = pictures.similarity(last, images[asked], others)
    if not labelled:  # an image is no neighbour of its own
        near[range(len(asked)), asked] = -2
    out, verdicts = [], []
    for number, best in zip(asked, near.topk(min(6, len(others) - (not labelled))).indices.tolist(), strict=True):
        kinds = [
            "" if None in (labels[number], names[i]) else "right" if names[i] == labels[number] else "wrong"
            for i in best
        ]
        found = [_thumbnail(others[i], names[i], kind) for i, kind in zip(best, kinds, strict=True)]
        out.append(f'<div class="card near">{_thumbnail(images[number], labels[number])}{"".join(found)}</div>')
        verdicts += kinds
    text = f"Left a query, then the six images with the nearest pooled features by cosine, among {len(others):,} of {len(gallery):,} gallery images."
    text += f" {verdicts.count('right')} of {len(verdicts)} are of the query's class." if any(verdicts) else ""
    return _patches(images, labels, encoders) + section("Nearest neighbours", text, *out, columns="420px")


def _thumbnail(image: np.ndarray, label: str | None, kind: str = "") -> str:
    name, mark = escape(label or ""), {"right": "✓ ", "wrong": "✗ "}.get(kind, "")
    caption = f'<figcaption title="{name}">{mark}{name}</figcaption>' if name else ""
    return f'<figure class="{kind}"><img alt="{name}" src="{pictures.data_url(image, 96)}">{caption}</figure>'


def _patches(images: np.ndarray, labels: pictures.Labels, encoders: dict[int, Encoder]) -> str:
    groups = pictures.spread(labels, 12, 4)
    mosaics = [pictures.mosaic(images[np.concatenate(groups[i : i + 4])]) for i in (0, 4, 8)]
    columns = {"image": [pictures.data_url(m) for m in mosaics]}
    for step, encoder in encoders.items():
        colors = pictures.pca_colors(np.stack([pictures.patch_features(encoder, m) for m in mosaics]))
        columns[f"pretrained, step {step:,}" if step else "untrained"] = [pictures.data_url(c) for c in colors]
    cells = "".join(f"<b>{name}</b>" for name in columns)
    for i in range(len(mosaics)):
        cells += "".join(f'<img alt="mosaic {i + 1}, {name}" src="{urls[i]}">' for name, urls in columns.items())
        rows = [labels[g[0]] or "" for g in groups[4 * i : 4 * i + 4] if len({labels[n] for n in g}) == 1]
        cells += f"<figcaption>rows: {escape(', '.join(rows))}</figcaption>" if len(rows) == 4 and all(rows) else ""
    text = (
        "Each mosaic of 4 × 4 images goes through the encoder as one picture. The three directions in which the patch features of all mosaics vary"
        " most (PCA) are shown as red, green and blue: patches of one colour look alike to the network. Colours do not compare between columns."
    )
    grid = f'<div class="mosaics" style="grid-template-columns:repeat({len(columns)},1fr)">{cells}</div>'
    return section("What the patches learned", text, grid, kind="")


def _drawn(run: Path) -> str:
    """The first and the last of each of the objective's pictures."""
    found: dict[str, list[Path]] = {}
    for path in sorted((run / "pictures").glob("*-*.png")):
        found.setdefault(path.stem.rpartition("-")[0], []).append(path)
    out = ""
    for name, paths in found.items():
        figures = []
        for path in sorted({paths[0], paths[-1]}):
            try:
                with Image.open(path) as picture:
                    url = pictures.data_url(np.asarray(picture.convert("RGB")))
                caption = f"step {int(path.stem.rpartition('-')[2]):,}"
            except (OSError, ValueError, SyntaxError):  # damaged, or not one of ours
                continue
            figures.append(f'<figure><img alt="{escape(name)}" src="{url}"><figcaption>{caption}</figcaption></figure>')
        if figures:
            text = CAPTIONS.get(name, "Drawn by the objective.")
            out += section(escape(name.capitalize()), text, *figures, columns="150px", kind="grid drawn")
    return out


def _foot(run: Path) -> str:
    text = f"<code>unlabeled train {escape(shlex.quote(str(run)))}</code> goes on with this run; <code>overwrite=true</code> starts it anew."
    recipe = f'<details class="card"><summary>The resolved recipe</summary><pre>{escape((run / "recipe.yaml").read_text())}</pre></details>'
    return section(
        "How to run it again",
        f"{text} This page: Python {platform.python_version()}, torch {torch.__version__}.",
        recipe,
    )
