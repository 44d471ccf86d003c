"""Score each export of a run as it appears, in a process of its own: training never waits for a score and no failed score stops it.

`python -m launch.evals RUN` scores what there is and waits for more until its standard input closes, which is when the trainer has ended.
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

from eval import results
from eval.run import TEXT, evaluate
from pretrain import card
from pretrain.errors import UserError, command
from pretrain.recipe import Recipe, is_text, load
from pretrain.run_folder import exports, read_rows, students

SAMPLED = 100  # tokens that a language model writes behind a prompt, at each export


def jobs(run: Path, recipe: Recipe) -> list[tuple[str, int, str]]:
    """(model, step, split) of every evaluation that is due: val for each export, test for the floor (pixels or bytes), the first and the last export."""
    cfg, out = recipe.eval, []
    if cfg.test and cfg.pixels and any(name not in TEXT for name in cfg.final):
        out.append(("bytes" if is_text(recipe) else "pixels", 0, "test"))
    for step, folder in [*exports(run).items(), *(pair for found in students(run).values() for pair in found.items())]:
        if cfg.val:
            out.append((str(folder), step, "val"))
        if cfg.test and step in (0, recipe.steps):
            out.append((str(folder), step, "test"))
    return out


def name_of(model: str) -> str:
    """What stands in result rows for an exported folder: the student's name, or whether it is the untrained network."""
    path = Path(model)
    if path.parent.name not in ("", ".", "export"):
        return path.parent.name
    return {"pixels": "pixels", "bytes": "bytes", "0": "untrained"}.get(path.name, "pretrained")


def score(run: Path, recipe: Recipe, model: str, step: int, split: str, board: object) -> None:
    """One evaluation: rows to results.jsonl, scalars to TensorBoard at the export's step."""
    cfg = recipe.eval
    gallery, query = (cfg.gallery, cfg.val) if split == "val" else (cfg.test_gallery or cfg.gallery, cfg.test)
    names = cfg.periodic if split == "val" else cfg.final
    floor = model in ("pixels", "bytes")
    names = [name for name in names if not floor or name not in TEXT]
    rows = evaluate(model, names, gallery, query, split, cfg.image_size)
    results.append(run / "results.jsonl", rows)
    if not floor:
        for row in rows:
            student = "" if row["model"] in ("untrained", "pretrained") else f"{row['model']}/"
            board.add_scalar(f"{student}{split}/{row['protocol']}/{row['metric']}", row["value"], step)  # type: ignore[attr-defined]
        if split == "val" and cfg.prompts:
            for row in (written := samples(Path(model), step, cfg.prompts)):
                board.add_text(f"samples/{row['prompt'] or 'beginning'}", escape(row["text"]), step)  # type: ignore[attr-defined]
            results.append(run / "samples.jsonl", written)
        board.flush()  # type: ignore[attr-defined]
        card.write(Path(model))


def samples(folder: Path, step: int, prompts: list[str]) -> list[dict[str, Any]]:
    """How an exported language model goes on from each prompt."""
    from pretrain.generate import Sampling, text

    how = Sampling(SAMPLED)
    return [{"step": step, "prompt": prompt, "text": "".join(text(folder, prompt, how))} for prompt in prompts]


def watch(run: Path) -> None:
    """Score what is due, again and again, until standard input closes and nothing is left."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    recipe, board = load(run), SummaryWriter(str(run / "tensorboard"))
    done = {(r["model"], r["step"], r["split"]) for r in read_rows(run / "results.jsonl")}
    ended = False
    while True:
        due = [job for job in jobs(run, recipe) if (name_of(job[0]), job[1], job[2]) not in done]
        if not due and ended:
            break
        for model, step, split in due:
            done.add((name_of(model), step, split))
            try:
                score(run, recipe, model, step, split, board)
            except Exception as error:  # a score that cannot be had is said, and training goes on
                with (run / "log.txt").open("a") as log:
                    log.write(
                        f"{time.strftime('%Y-%m-%d %H:%M:%S')} evaluation of {model} on {split} failed: {error}\n"
                    )
                    if not isinstance(error, UserError):
                        traceback.print_exc(file=log)
                print(f"evaluation of {model} on {split} failed: {error}", file=sys.stderr)
        ended = ended or _closed(wait=0.5 if not due else 0)
    board.close()


def _closed(wait: float) -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], wait)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    sys.exit(command(lambda: watch(Path(sys.argv[1]))))
