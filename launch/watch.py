"""Evaluate each export of a run as soon as it is written, in a separate process, so that the training neither waits for
an evaluation nor ends if an evaluation fails.

`python -m launch.watch RUN` evaluates the exports that exist, and waits for further ones until its standard input is
closed, which happens when the training has ended.
"""

from __future__ import annotations

import os
import select
import sys
import time
import traceback
from html import escape
from pathlib import Path
from typing import Any

from common import child_signals
from common.errors import UserError, run_main
from common.output import say
from eval import results
from eval.run import TEXT, evaluate
from pretrain.interchange import model_card
from pretrain.recipes.recipe import Recipe, stored
from pretrain.run_folder.export_folders import exports, student_exports
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.signals import EXIT_UNSCORED

BASELINE = {"image": "pixels", "tokens": "bytes"}  # {part that a model reads: baseline, whose features need no model}
SAMPLE_TOKENS = 100  # number of tokens that a language model generates for each prompt


def jobs(run: Path, recipe: Recipe) -> list[tuple[str, int, str]]:
    """(model, step, split) of all evaluations of a run. Each export is evaluated on val. The baseline (pixels or bytes)
    and the exports of step 0 and of the last step are evaluated on test."""
    cfg, out = recipe.eval, []
    if cfg.test and cfg.pixels and any(name not in TEXT for name in cfg.final):
        out.append((BASELINE[recipe.model.reads], 0, "test"))
    for step, folder in [
        *exports(run).items(),
        *(pair for found in student_exports(run).values() for pair in found.items()),
    ]:
        if cfg.val:
            out.append((str(folder), step, "val"))
        if cfg.test and step in (0, recipe.steps):
            out.append((str(folder), step, "test"))
    return out


def name_of(model: str) -> str:
    """The name of a model in the rows of results.jsonl: the baseline's name, the name of a student, "untrained" for the
    export of step 0, otherwise "pretrained"."""
    path = Path(model)
    if path.parent.name not in ("", ".", "export"):
        return path.parent.name
    return {"pixels": "pixels", "bytes": "bytes", "0": "untrained"}.get(path.name, "pretrained")


def score(run: Path, recipe: Recipe, model: str, step: int, split: str, board: object) -> None:
    """Run one evaluation. Write its rows to results.jsonl, its scalars to TensorBoard at the step of the export, and
    the model card of the export. For a language model on val, also write generated texts to samples.jsonl."""
    from pretrain.parallel.device import scoring_device

    cfg = recipe.eval
    gallery, query = (cfg.gallery, cfg.val) if split == "val" else (cfg.test_gallery or cfg.gallery, cfg.test)
    names = cfg.periodic if split == "val" else cfg.final
    baseline = model in ("pixels", "bytes")
    names = [name for name in names if not baseline or name not in TEXT]
    device = scoring_device(cfg.device, recipe.device)
    rows = evaluate(model, names, gallery, query, split, cfg.image_size, device=device)
    results.append(run / "results.jsonl", rows)
    if not baseline:
        for row in rows:
            student = "" if row["model"] in ("untrained", "pretrained") else f"{row['model']}/"
            board.add_scalar(f"{student}{split}/{row['protocol']}/{row['metric']}", row["value"], step)  # type: ignore[attr-defined]
        if split == "val" and cfg.prompts:
            generated = samples(Path(model), step, cfg.prompts)
            for row in generated:
                board.add_text(f"samples/{row['prompt'] or 'beginning'}", escape(row["text"]), step)  # type: ignore[attr-defined]
            results.append(run / "samples.jsonl", generated)
        board.flush()  # type: ignore[attr-defined]
        model_card.write(Path(model))


def samples(folder: Path, step: int, prompts: list[str]) -> list[dict[str, Any]]:
    """The text with which an exported language model continues each prompt, as rows of samples.jsonl."""
    from eval.generate import Sampling, text

    sampling = Sampling(SAMPLE_TOKENS)
    return [{"step": step, "prompt": prompt, "text": "".join(text(folder, prompt, sampling))} for prompt in prompts]


def watch(run: Path) -> int:
    """Run all evaluations, including those of exports that are written in the meantime, until standard input is closed.

    Failed evaluations are then retried once. Returns EXIT_UNSCORED if one has failed again, otherwise 0.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from pretrain.parallel.device import threads

    torch.set_num_threads(threads(2))
    recipe, board = stored(run), SummaryWriter(str(run / "tensorboard"))
    done = {(r["model"], r["step"], r["split"]) for r in read_rows(run / "results.jsonl")}
    training_ended, retrying = False, False
    failed: list[tuple[str, int, str]] = []
    while True:
        due = [job for job in jobs(run, recipe) if (name_of(job[0]), job[1], job[2]) not in done]
        if not due and training_ended:
            if retrying or not failed:
                break
            retrying, failed, due = True, [], failed
        for model, step, split in due:
            done.add((name_of(model), step, split))
            try:
                score(run, recipe, model, step, split, board)
            except Exception as error:  # any error is logged, and the next export is evaluated
                failed.append((model, step, split))
                line = f"evaluation of {model} on {split} failed: {error}"
                with (run / "log.txt").open("a") as log:
                    say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=log)
                    if not isinstance(error, UserError):
                        say(*traceback.format_exc().split("\n"), file=log)
                say(line, file=sys.stderr)
        training_ended = training_ended or _input_closed(wait=0.5 if not due else 0)
    board.close()
    return EXIT_UNSCORED if failed else 0


def _input_closed(wait: float) -> bool:
    """Wait up to `wait` seconds for standard input to be closed, and return whether it is."""
    ready, _, _ = select.select([sys.stdin], [], [], wait)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    child_signals.ignore()  # the parent process handles signals, and ends this process
    sys.exit(run_main(lambda: watch(Path(sys.argv[1]))))
