"""The model card of an export: recipe, data with its fingerprint, steps and scores, as README.md in the exported folder. Reads files only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain import config
from pretrain.run_folder import read_rows


def write(folder: Path) -> Path:
    """Write the card of RUN/export/STEP, or of an export that lies elsewhere, without what its run would tell."""
    fields = json.loads((folder / "config.json").read_text())
    run = next((p for p in folder.resolve().parents if (p / "recipe.yaml").is_file()), None)
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
    about, own = fields["unlabeled"], fields["model_type"].startswith("unlabeled")
    model = about["model"]
    name = f"{model['name']}, pretrained with {about.get('objective')}"
    options = ", ".join(
        f"{k} {v}"
        for k, v in model.items()
        if k in ("dim", "depth", "heads", "patch_size", "widths", "depths", "registers", "architecture")
    )
    return [
        "---",
        f"library_name: {'timm' if 'architecture' in fields else 'unlabeled' if own else 'transformers'}",
        "tags: [self-supervised, image-feature-extraction]",
        "---",
        f"# {name}, step {about.get('step')}",
        "",
        "A backbone trained without labels by `unlabeled`.",
        f"Options: {options}. Pixels: mean {about['mean']}, std {about['std']} after division by 255; features are pooled by {about.get('pool', 'cls')}.",
        "",
    ]


def _use(fields: dict[str, Any]) -> list[str]:
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
    return ["## Recipe", "", f"{steps} steps of {batch} images, {recipe['precision']}.", "", "```yaml", text, "```"]
