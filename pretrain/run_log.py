"""The log of a run, on the terminal and in log.txt, and the lines with which a run ends."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path

from common import output
from common.appended_lines import LineFile
from data_pipeline.stream.stream import Stream
from pretrain.interchange import export
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.recipes.recipe import Recipe


class Log:
    """Writes lines to the terminal and to log.txt, on rank 0 only. With `every_rank`, the other ranks write the line,
    too, with their rank in front of it."""

    def __init__(self, run: Path):
        self.lines = LineFile(run / "log.txt")

    def __call__(self, line: str, every_rank: bool = False) -> None:
        if processes.rank():
            if not every_rank:
                return
            line = f"rank {processes.rank()}: {line}"
        with contextlib.suppress(output.OutputClosed):  # a run continues when its terminal has been closed
            output.say(line)
        self.lines.add(output.printable(time.strftime("%Y-%m-%d %H:%M:%S ") + line) + "\n")


def frozen_parts(cfg: Recipe, objective: Objective) -> list[str]:
    """A line that names the modules which are frozen, for the whole run or for its first steps; no line if there are
    none."""
    children = {name: list(module.parameters()) for name, module in objective.named_children()}
    no_gradients = [name for name, params in children.items() if params and not any(p.requires_grad for p in params)]
    frozen = [f"{', '.join(no_gradients)} (no gradients)"] if no_gradients else []
    if step := cfg.optim.freeze_backbone:
        frozen.append(f"the backbone until step {step} (optim.freeze_backbone)")
    if step := cfg.optim.freeze_last_layer:
        frozen.append(f"the last layers of the heads until step {step} (optim.freeze_last_layer)")
    return [f"frozen: {'; '.join(frozen)}"] if frozen else []


def data_summary(run: Path, stream: Stream, first: int, end: int, unit: str) -> str:
    """A line about the samples of all ranks: the number of those trained on or skipped in the steps from `first` to
    `end`, and of those found damaged in the whole run. Collective. `unit`: the word for a sample ("samples",
    "rows")."""
    per_rank = processes.gather((stream.absent, list(stream.damage_log.bad)))
    trained = sum(map(stream.plan.batch, range(first, end)))
    damaged = len({name for _, bad in per_rank for name in bad})
    parts = [f"{run}: trained on {trained} {unit} in the steps from {first} to {end}"]
    if unit == "samples":
        parts.append(f"samples that lack a part were skipped {sum(absent for absent, _ in per_rank)} times")
    listed = f", all listed in {run / 'damaged'}" if damaged else ""
    parts.append(f"{damaged} {'was' if damaged == 1 else 'were'} damaged and replaced by neighbours{listed}")
    return "; ".join(parts)


def finished_line(cfg: Recipe, run: Path, objective: Objective) -> str:
    """The last line of a finished run: where its exports, scores and report are, and which commands use them."""
    model, *more = export.folders(run / "export" / str(cfg.steps), objective).values()
    quoted_model, quoted_run = shlex.quote(str(model)), shlex.quote(str(run))
    score = f"unlabeled eval {quoted_model}"
    scored = {key for key, shards in cfg.eval.shard_lists().items() if shards and not key.endswith("gallery")}
    if not scored & {"test", "final.query"}:
        score += " gallery=SHARDS query=SHARDS"
    use = f"unlabeled generate {quoted_model} PROMPT" if cfg.model.writes else score
    further = f", further exports are {', '.join(map(str, more))}" if more else ""
    scores = f", its scores will be in {run / 'results.jsonl'}" if scored or cfg.eval.health else ""
    return (
        f"{run}: finished its {cfg.steps} steps; its export is {model}{further}{scores}."
        f" Next: `unlabeled report {quoted_run}`, which writes {run / 'report.html'}; `{use}`"
    )
