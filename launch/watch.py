"""Evaluate each export of a run as soon as it is written, in a separate process, so that the training neither waits for
an evaluation nor ends if an evaluation fails.

`python -m launch.watch RUN` evaluates the exports that exist, and waits for further ones until its standard input is
closed, which happens when the training has ended.

`python -m launch.watch RUN MODEL STEP SPLIT IDENTITY` runs one evaluation; `launch.evaluation_jobs` submits this command
as a job. IDENTITY is the identity of the run when the job was submitted; if the run has been overwritten since, the
command ends with an error.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from common import child_signals
from common.appended_lines import LineFile
from common.errors import UserError, run_main
from common.output import printable, say
from eval import results
from eval.run import by_protocol
from eval.tiers import tasks
from launch.due_evaluations import SAMPLES, due, lacks, name_of
from launch.rank_records import read_record, record
from pretrain.collapse_monitor import OF_HEALTH, of_health
from pretrain.interchange import model_card
from pretrain.recipes.recipe import Recipe, stored
from pretrain.run_folder.jsonl_rows import read_rows
from pretrain.run_folder.marker import run_identity
from pretrain.run_folder.scalars import BASELINES, score_name
from pretrain.run_folder.written_files import BEGUN
from pretrain.signals import EXIT_UNSCORED

MAX_DEATHS = 2  # of the process during one evaluation, after which this one is left out
_log_file = functools.cache(LineFile)  # keeps the lines that a full disk did not take
SAMPLE_TOKENS = 100  # number of tokens that a language model generates for each prompt


def score(
    run: Path, recipe: Recipe, model: str, step: int, split: str, board: Any, device: str
) -> list[tuple[str, Exception]]:
    """Run one evaluation. Write the rows of each protocol to results.jsonl as soon as they are known, its scalars to
    TensorBoard at the step of the export, and the model card of the export. For a language model on val, first write
    generated texts to samples.jsonl. Returns (protocol, error) for those that have failed.

    Protocols of which results.jsonl has rows are not computed again, and rows that another process has written in the
    meantime are not written. `board`: the `pretrain.metrics.Board` of the run. `device`: of a tier that names none.
    """
    cfg, identity, task = recipe.eval, run_identity(run)["id"], tasks(recipe)[split]
    names = lacks((model, step, split), task, recipe, results.scored(run / "results.jsonl"))
    baseline = model in BASELINES
    if not baseline and split == "val" and cfg.prompts:
        _generate(run, Path(model), step, cfg.prompts, identity, board)
    names = [name for name in names if name != SAMPLES]
    # A run has many exports, and the features of each need gigabytes: kept are those of the first and the last one.
    keep = baseline or step in (0, recipe.steps)
    options = {name: values for name, values in task.option_values().items() if name in names}
    device, failed = task.device or device, []
    for name, rows_of in by_protocol(
        model, names, task.gallery, task.query, split, cfg.image_size, options, device, cfg.cache, keep
    ):
        try:
            rows = rows_of()
        except Exception as error:  # the other protocols are computed
            failed.append((name, error))
            continue
        _check_identity(run, identity)
        if rows and not results.new_rows(run / "results.jsonl", rows):
            continue
        if name == "health":
            _note_collapse(run, recipe, rows, step)
        if not baseline:
            board.add(functools.partial(_show, [("add_scalar", score_name(row), row["value"]) for row in rows], step))
        results.append_new(run / "results.jsonl", rows)  # last: a protocol of which there are rows is complete
    if not baseline:
        model_card.write(Path(model))  # with these rows
    return failed


def _show(entries: list[tuple[str, str, Any]], step: int, writer: Any) -> None:
    """Write entries (method of a SummaryWriter, tag, value) to TensorBoard."""
    for method, tag, value in entries:
        getattr(writer, method)(tag, value, step)


def _note_collapse(run: Path, recipe: Recipe, rows: list[dict[str, Any]], step: int) -> None:
    """If the numbers of `health` of an export show a collapse, add a note to its rows, and a line to log.txt."""
    models = ("untrained", rows[0]["model"])  # a student of a distillation has its name at each step
    known = [
        row
        for row in read_rows(run / "results.jsonl")
        if (row["protocol"], row["step"]) == ("health", 0) and row["model"] in models
    ]
    first, values = ({row["metric"]: row["value"] for row in each} for each in (known, rows))
    if not OF_HEALTH.keys() <= first.keys():  # the export of step 0 has not been measured
        return
    if reason := of_health(values, first, recipe.objective.remedies):
        for row in rows:
            row["note"] = reason
        _log(run, f"step {step}: collapse: {reason}")


def _generate(run: Path, model: Path, step: int, prompts: list[str], identity: str, board: Any) -> None:
    """Write the texts that an exported language model generates, unless samples.jsonl holds them."""
    known = {(row["step"], row["prompt"]) for row in read_rows(run / "samples.jsonl")}
    missing = [prompt for prompt in prompts if (step, prompt) not in known]
    if not missing:
        return
    generated = samples(model, step, missing)
    _check_identity(run, identity)
    texts = [("add_text", f"samples/{row['prompt'] or 'beginning'}", escape(row["text"])) for row in generated]
    board.add(functools.partial(_show, texts, step))
    results.append_new(run / "samples.jsonl", generated, ("step", "prompt"))


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
    """Run one evaluation, as far as results.jsonl lacks its rows. Returns 0. Raises UserError if the run with this
    identity was overwritten, and the error of the first protocol that has failed."""
    import torch

    from pretrain.metrics import Board
    from pretrain.parallel.device import threads

    recipe = stored(run)
    _check_identity(run, identity)
    if not lacks((model, step, split), tasks(recipe)[split], recipe, results.scored(run / "results.jsonl")):
        if Path(model).is_dir():  # a process may have ended between its rows and the model card
            model_card.write(Path(model))
        return 0
    torch.set_num_threads(threads(1))
    board = Board(run / "tensorboard")
    failed = score(run, recipe, model, step, split, board, recipe.eval.device)
    board.close()
    for name, error in failed[1:]:
        say(f"{name}: {error}", file=sys.stderr)
    if failed:
        raise failed[0][1]
    return 0


def watch(run: Path) -> int:
    """Run all evaluations, including those of exports that are written in the meantime, until standard input is closed.

    Failed evaluations are then retried once. Returns EXIT_UNSCORED if one has failed again, otherwise 0.
    """
    import torch

    from pretrain.metrics import Board
    from pretrain.parallel.device import scoring_device, threads

    torch.set_num_threads(threads(2))
    recipe, board = stored(run), Board(run / "tensorboard")
    device = scoring_device(recipe.eval.device, recipe.device)
    done: set[tuple[str, int, str]] = set()  # evaluations that were tried
    training_ended, retrying = False, False
    failed: list[tuple[str, int, str]] = []
    while True:
        waiting = [job for job in due(run, recipe) if job not in done]
        if not waiting and training_ended:
            if retrying or not failed:
                break
            retrying, waiting, failed = True, failed, []
            done -= {*waiting}
        for job in waiting[:1]:  # one at a time: a new export may be due before the others
            done.add(job)
            try:
                with _begun(run / BEGUN, f"{name_of(job[0])}-{job[1]}-{job[2]}"):
                    problems = score(run, recipe, *job, board, device)
            except Exception as error:  # any error is logged, and the next export is evaluated
                problems = [("", error)]
            if problems:
                failed.append(job)
            for name, problem in problems:
                _log_failure(run, job, name, problem)
        training_ended = training_ended or child_signals.input_closed(wait=0.5 if not waiting else 0)
    board.close()
    return EXIT_UNSCORED if failed else 0


@contextlib.contextmanager
def _begun(path: Path, name: str) -> Iterator[None]:
    """Record in a file that an evaluation has begun, until it has ended in some way.

    Raises UserError if it has begun MAX_DEATHS times without an end, because the process died, for example for lack of
    memory, so that it does not keep the other evaluations from being computed. The parent process deletes the file when
    a command starts.
    """
    path.parent.mkdir(exist_ok=True)
    counts = read_record(path)
    if counts.get(name, 0) >= MAX_DEATHS:
        raise UserError(f"the scoring process died {MAX_DEATHS} times while it was computed, so it is left out")
    record(path, **counts | {name: counts.get(name, 0) + 1})
    try:
        yield
    finally:
        _end(path, name)


def _end(path: Path, name: str) -> None:
    """Record that an evaluation has ended."""
    record(path, **read_record(path) | {name: 0})


def _log_failure(run: Path, job: tuple[str, int, str], protocol: str, error: Exception) -> None:
    """Write why an evaluation has failed to log.txt and to standard error."""
    line = f"evaluation of {job[0]} on {job[2]}{f' by {protocol}' if protocol else ''} failed: {error}"
    is_ours = not isinstance(error, UserError)
    _log(run, line, *("".join(traceback.format_exception(error)).split("\n") if is_ours else ()))


def _log(run: Path, line: str, *details: str) -> None:
    """Write a line to standard error and, with the time and with details below it, to log.txt."""
    lines = (f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", *details)
    _log_file(run / "log.txt").add("".join(f"{printable(one)}\n" for one in lines))
    say(line, file=sys.stderr)


if __name__ == "__main__":
    child_signals.ignore()  # the parent process handles signals, and ends this process
    if len(sys.argv) > 2:
        sys.exit(run_main(lambda: evaluate_one(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])))
    sys.exit(run_main(lambda: watch(Path(sys.argv[1]))))
