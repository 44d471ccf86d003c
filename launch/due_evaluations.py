"""The evaluations that a run needs, and the names of the models that they evaluate. This module imports no torch."""

from __future__ import annotations

from pathlib import Path

from eval.protocol_finder import LABELS, needs
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.export_folders import exports, student_exports

# {part that a model reads: baseline, whose features need no model}
BASELINE = {"image": "pixels", "clip": "clip_pixels", "tokens": "bytes", "audio": "log_mel"}


def due(run: Path, recipe: Recipe) -> list[tuple[str, int, str]]:
    """(model, step, split) of all evaluations of a run. Each export is evaluated on val and, without labels, on train.
    The baseline (pixels, bytes or log_mel) and the exports of step 0 and of the last step are evaluated on test."""
    cfg, out = recipe.eval, []
    if cfg.test and cfg.pixels and any(needs(name) == LABELS for name in cfg.final):
        out.append((BASELINE[recipe.model.reads], 0, "test"))
    for step, folder in [
        *exports(run).items(),
        *(pair for found in student_exports(run).values() for pair in found.items()),
    ]:
        if cfg.val:
            out.append((str(folder), step, "val"))
        if cfg.health:
            out.append((str(folder), step, "train"))
        if cfg.test and step in (0, recipe.steps):
            out.append((str(folder), step, "test"))
    return out


def name_of(model: str) -> str:
    """The name of a model in the rows of results.jsonl: the baseline's name, the name of a student, "untrained" for the
    export of step 0, otherwise "pretrained"."""
    path = Path(model)
    if path.parent.name not in ("", ".", "export"):
        return path.parent.name
    return {**{name: name for name in BASELINE.values()}, "0": "untrained"}.get(path.name, "pretrained")
