"""The evaluations that a run needs, and the names of the models that they evaluate. This module imports no torch."""

from __future__ import annotations

from pathlib import Path

from eval import results
from eval.protocol_finder import LABELS, needs
from eval.tiers import FULL, Task, tasks
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.export_folders import exports, student_exports
from pretrain.run_folder.scalars import BASELINES

# {part that a model reads: baseline, whose features need no model}
BASELINE = {"image": "pixels", "clip": "clip_pixels", "tokens": "bytes", "audio": "log_mel"}
SAMPLES = "samples"  # texts that a language model generates, which are no protocol


def due(run: Path, recipe: Recipe) -> list[tuple[str, int, str]]:
    """(model, step, split) of all evaluations of a run that lack rows, those of the split `full` last. Exports are
    evaluated on val, on full and, without labels, on train. The baseline (pixels, bytes or log_mel) and the exports of
    step 0 and of the last step are evaluated on test."""
    known, scored = tasks(recipe), results.scored(run / "results.jsonl")
    found = [(BASELINE[recipe.model.reads], 0, "test")] if recipe.eval.pixels and "test" in known else []
    for step, folder in [
        *exports(run).items(),
        *(pair for of_student in student_exports(run).values() for pair in of_student.items()),
    ]:
        for split, task in known.items():
            if step in (0, recipe.steps) if split == "test" else task.is_due(step, recipe.steps):
                found.append((str(folder), step, split))
    lacking = [one for one in found if lacks(one, known[one[2]], recipe, scored)]
    return sorted(lacking, key=lambda one: one[2] == FULL)


def lacks(one: tuple[str, int, str], task: Task, recipe: Recipe, scored: set[tuple[str, int, str, str]]) -> list[str]:
    """What an evaluation (model, step, split) has to compute: names of protocols without rows in `scored`, see
    `results.scored`. For a language model on val that has no protocols, but prompts: [SAMPLES]."""
    model, step, split = one
    names = [name for name in task.protocols if model not in BASELINES or needs(name) == LABELS]
    if not names and split == "val" and recipe.eval.prompts:
        return [SAMPLES]
    return [name for name in names if (name_of(model), step, split, name) not in scored]


def name_of(model: str) -> str:
    """The name of a model in the rows of results.jsonl: the baseline's name, the name of a student, "untrained" for the
    export of step 0, otherwise "pretrained"."""
    path = Path(model)
    if path.parent.name not in ("", ".", "export"):
        return path.parent.name
    return {**{name: name for name in BASELINE.values()}, "0": "untrained"}.get(path.name, "pretrained")
