"""Evaluate each export of a run as soon as it is written, in a separate process, so that the training neither waits for
an evaluation nor ends if an evaluation fails.

`python -m launch.watch RUN` evaluates the exports that exist, and waits for further ones until its standard input is
closed, which happens when the training has ended.

`python -m launch.watch RUN MODEL STEP SPLIT IDENTITY` runs one evaluation; `launch.evaluation_jobs` submits this command
as a job. IDENTITY is the identity of the run when the job was submitted; if the run has been overwritten since, the
command ends with an error.
"""

from __future__ import annotations

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
from eval.periodic_scoring import training_shards
from eval.protocol_finder import LABELS, needs
from eval.run import evaluate
from launch.due_evaluations import due, name_of
from pretrain.interchange import model_card
from pretrain.recipes.recipe import Recipe, stored
from pretrain.run_folder.marker import run_identity
from pretrain.run_folder.scalars import BASELINES, score_name
from pretrain.signals import EXIT_UNSCORED

SAMPLE_TOKENS = 100  # number of tokens that a language model generates for each prompt


def score(run: Path, recipe: Recipe, model: str, step: int, split: str, board: Any, device: str) -> None:
    """Run one evaluation on a device. Write its rows to results.jsonl, its scalars to TensorBoard at the step of the
    export, and the model card of the export. For a language model on val, also write generated texts to samples.jsonl.
    `board`: the SummaryWriter of the run.

    Nothing is written if another process has completed this evaluation in the meantime.
    """
    cfg, identity = recipe.eval, run_identity(run)["id"]
    gallery, query, names = {
        "val": (cfg.gallery, cfg.val, cfg.periodic),
        "test": (cfg.test_gallery or cfg.gallery, cfg.test, cfg.final),
        "train": ([], training_shards(recipe), ["health"]),
    }[split]
    baseline = model in BASELINES
    names = [name for name in names if not baseline or needs(name) == LABELS]
    # A run has many exports, and the features of each need gigabytes: kept are those of the first and the last one.
    keep = baseline or step in (0, recipe.steps)
    rows = evaluate(
        model,
        names,
        gallery,
        query,
        split,
        cfg.image_size,
        options={"health": {"samples": cfg.health}} if split == "train" else None,
        device=device,
        cache=cfg.cache,
        keep_features=keep,
    )
    generated = samples(Path(model), step, cfg.prompts) if not baseline and split == "val" and cfg.prompts else []
    _check_identity(run, identity)
    if rows and not results.new_rows(run / "results.jsonl", rows):
        return
    if not baseline:
        for row in rows:
            board.add_scalar(score_name(row), row["value"], step)
        for row in generated:
            board.add_text(f"samples/{row['prompt'] or 'beginning'}", escape(row["text"]), step)
        if generated:
            results.append_new(run / "samples.jsonl", generated, ("step", "prompt", "text"))
        board.flush()
    if rows:  # last: an evaluation of which there are rows is complete
        results.append_new(run / "results.jsonl", rows)
    if not baseline:
        model_card.write(Path(model))  # with these rows


def _check_identity(run: Path, identity: str) -> None:
    """Raises UserError if the run that had this identity was overwritten."""
    if run_identity(run)["id"] != identity:
        raise UserError(f"{run}: was overwritten since the evaluation began, whose scores are dropped")


def samples(folder: Path, step: int, prompts: list[str]) -> list[dict[str, Any]]:
    """The text with which an exported language model continues each prompt, as rows of samples.jsonl."""
    from eval.generate import Sampling, text

    sampling = Sampling(SAMPLE_TOKENS)
    return [{"step": step, "prompt": prompt, "text": "".join(text(folder, prompt, sampling))} for prompt in prompts]


def evaluate_one(run: Path, model: str, step: int, split: str, identity: str) -> int:
    """Run one evaluation, unless results.jsonl has its rows. Returns 0. Raises UserError if the run with this identity
    was overwritten."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from pretrain.parallel.device import threads

    if (name_of(model), step, split) in results.evaluated(run / "results.jsonl"):
        if Path(model).is_dir():  # a process may have ended between its rows and the model card
            model_card.write(Path(model))
        return 0
    torch.set_num_threads(threads(1))
    recipe = stored(run)
    _check_identity(run, identity)
    board = SummaryWriter(str(run / "tensorboard"))
    score(run, recipe, model, step, split, board, recipe.eval.device)
    board.close()
    return 0


def watch(run: Path) -> int:
    """Run all evaluations, including those of exports that are written in the meantime, until standard input is closed.

    Failed evaluations are then retried once. Returns EXIT_UNSCORED if one has failed again, otherwise 0.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    from pretrain.parallel.device import scoring_device, threads

    torch.set_num_threads(threads(2))
    recipe, board = stored(run), SummaryWriter(str(run / "tensorboard"))
    device = scoring_device(recipe.eval.device, recipe.device)
    done = results.evaluated(run / "results.jsonl")
    training_ended, retrying = False, False
    failed: list[tuple[str, int, str]] = []
    while True:
        waiting = [job for job in due(run, recipe) if (name_of(job[0]), job[1], job[2]) not in done]
        if not waiting and training_ended:
            if retrying or not failed:
                break
            retrying, failed, waiting = True, [], failed
        for model, step, split in waiting:
            done.add((name_of(model), step, split))
            try:
                score(run, recipe, model, step, split, board, device)
            except Exception as error:  # any error is logged, and the next export is evaluated
                failed.append((model, step, split))
                line = f"evaluation of {model} on {split} failed: {error}"
                with (run / "log.txt").open("a") as log:
                    say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=log)
                    if not isinstance(error, UserError):
                        say(*traceback.format_exc().split("\n"), file=log)
                say(line, file=sys.stderr)
        training_ended = training_ended or child_signals.input_closed(wait=0.5 if not waiting else 0)
    board.close()
    return EXIT_UNSCORED if failed else 0


if __name__ == "__main__":
    child_signals.ignore()  # the parent process handles signals, and ends this process
    if len(sys.argv) > 2:
        sys.exit(run_main(lambda: evaluate_one(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])))
    sys.exit(run_main(lambda: watch(Path(sys.argv[1]))))
