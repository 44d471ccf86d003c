"""The model card of an export: recipe, data with its fingerprint, steps and scores, as README.md in the exported folder. Reads files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain import config
from pretrain.layouts.transformers_text import CLASSES, OWN
from pretrain.run_folder import read_rows


def write(folder: Path, run: Path | None = None) -> Path:
    """Write the card of an export of `run`, which need not be told of RUN/export/STEP; of an export without a run, without what that would tell."""
    fields = json.loads((folder / "config.json").read_text())
    run = run or next((p for p in folder.resolve().parents if (p / "recipe.yaml").is_file()), None)
    lines = [*_head(fields), *_use(fields)]
    if run is not None:
        about = fields["unlabeled"]
        lines += [*_scores(run, about.get("step"), about.get("student")), *_data(run), *_recipe(run)]
    target = folder / "README.md"
    temporary = folder / ".README.md"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(target)
    return target


def _head(fields: dict[str, Any]) -> list[str]:
    about, own, text = fields["unlabeled"], fields["model_type"].startswith("unlabeled"), _text_task(fields)
    model = about["model"]
    name = f"{model['name']}, pretrained with {about.get('objective')}"
    options = ", ".join(
        f"{k} {v}"
        for k, v in model.items()
        if k in ("dim", "depth", "heads", "patch_size", "widths", "depths", "registers", "architecture")
        or (text and k in ("vocab_size", "context"))
    )
    if text:
        said = "A language model trained by `unlabeled`."
        more = ""
    else:
        said = "A backbone trained without labels by `unlabeled`."
        more = f" Pixels: mean {about['mean']}, std {about['std']} after division by 255; features are pooled by {about.get('pool', 'cls')}."
    return [
        "---",
        f"library_name: {'timm' if 'architecture' in fields else 'unlabeled' if own else 'transformers'}",
        f"tags: [self-supervised, {text or 'image-feature-extraction'}]",
        "---",
        f"# {name}, step {about.get('step')}",
        "",
        said,
        f"Options: {options}.{more}",
        "",
    ]


def _text_task(fields: dict[str, Any]) -> str:
    """The hub's word for what a text model does; "" for others."""
    tasks = {"bert": "fill-mask", "t5": "text2text-generation", OWN: "text-generation"}
    return tasks.get(fields["model_type"], "text-generation" if fields["model_type"] in CLASSES else "")


def _use(fields: dict[str, Any]) -> list[str]:
    if fields["model_type"] in CLASSES:
        name = CLASSES[fields["model_type"]]
        return [
            f"    from transformers import AutoTokenizer, {name}",
            f"    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), {name}.from_pretrained(FOLDER).eval()",
            "",
            *([] if name == "BertForMaskedLM" else ['or `unlabeled generate FOLDER "Once upon a time"`.', ""]),
        ]
    if fields["model_type"].startswith("unlabeled"):
        return ["    from pretrain.weights import load_backbone", "    encoder, about = load_backbone(FOLDER)", ""]
    if "architecture" in fields:
        return ["    import timm", '    model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()', ""]
    return [
        "    from transformers import AutoImageProcessor, AutoModel",
        "    processor, model = AutoImageProcessor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER).eval()",
        '    features = model(**processor(image, return_tensors="pt")).last_hidden_state  # class token first',
        "",
    ]


def _scores(run: Path, step: int | None, student: str | None) -> list[str]:
    """Of the recipe's own model, or of one of its further students."""
    names = (student,) if student else ("untrained", "pretrained")
    rows = [r for r in read_rows(run / "results.jsonl") if r["step"] == step and r.get("model") in names]
    if not rows:
        return ["## Scores", "", "None were taken of this step.", ""]
    lines = ["## Scores", "", "| split | protocol | metric | value | images |", "|---|---|---|---|---|"]
    newest = {(r["split"], r["protocol"], r["metric"]): r for r in rows}
    lines += [f"| {s} | {p} | {m} | {r['value']:.4f} | {r['count']} |" for (s, p, m), r in newest.items()]
    return [*lines, ""]


def _data(run: Path) -> list[str]:
    """A line for each dataset, from what the run has written down of it: samples, and the digest that all its shards' hashes give."""
    from data_pipeline import index

    lines = ["## Data", ""]
    for path in sorted((run / "data").glob("*.json")):
        held = index.parse(path.read_bytes(), str(run / "data"), str(path))
        lines.append(f"- {held.samples} samples in {len(held.names)} shards, fingerprint `{held.id}`")
    return [*lines, ""] if len(lines) > 2 else []


def _recipe(run: Path) -> list[str]:
    recipe = config.read_yaml(run / "recipe.yaml")
    steps, batch = recipe["steps"], recipe["data"]["batch"]
    text = (run / "recipe.yaml").read_text().strip()
    return ["## Recipe", "", f"{steps} steps of {batch} samples, {recipe['precision']}.", "", "```yaml", text, "```"]
