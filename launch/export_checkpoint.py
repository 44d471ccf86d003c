"""The command `export`: write the encoders of a checkpoint as folders that other libraries can open."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.output import say
from pretrain.build import build_objective
from pretrain.checkpoint.load import load_model
from pretrain.checkpoint.open_store import run_store
from pretrain.checkpoint.store import checkpoint_name
from pretrain.interchange import export as exports
from pretrain.interchange.export_formats import Failed, check, opened_by, release
from pretrain.recipes.recipe import Recipe


def export(run: Path, recipe: Recipe, target: Path | None, step: int | None, also: Sequence[str]) -> int:
    """Write the encoders of a run's checkpoint at `step` (None: the newest) to `target` (None: RUN/export/STEP), in the
    format of the project and in the formats `also`. Returns the exit status: 2 if a format failed, otherwise 0."""
    check(also)
    store = run_store(run, recipe)
    name = store.latest() if step is None else checkpoint_name(step)
    if name not in store.complete_names():
        steps = ", ".join(str(int(saved)) for saved in store.complete_names())
        if not steps:
            raise UserError(f"{run}: has no checkpoint yet; train it first: unlabeled train {run}")
        raise UserError(f"{run}: no checkpoint of step {step}; it has: {steps}")
    objective = build_objective(recipe)
    load_model(store, name, objective)
    saved_step = int(name)
    place = target or run / "export" / str(saved_step)
    for encoder, folder in exports.folders(place, objective).items() if target else ():
        if folder.exists() and not exports.holds(folder, objective.exports()[encoder], saved_step):
            raise UserError(f"{folder}: exists and is not this export; name another folder, or delete it")
    tokenizer = run / "tokenizer.json"
    folders = exports.save(place, objective, recipe, saved_step, None, tokenizer if tokenizer.is_file() else None, run)
    status = 0
    for folder in folders:
        own_format, how_to_open = opened_by(folder)
        try:
            release(folder, list(dict.fromkeys([own_format, *also] if own_format else also)), say)
        except Failed as error:
            say(*(f"error: {line}" for line in error.lines), file=sys.stderr)
            status = 2
        say(f"{folder}: {how_to_open}")
    return status
