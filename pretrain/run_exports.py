"""Writes the exports of a step of a run, and the objective's pictures."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from common.errors import UserError
from data_pipeline.shards.vocabulary import TOKENIZER
from data_pipeline.stream.stream import Stream
from pretrain.build import placed
from pretrain.interchange import export
from pretrain.metrics import Writer
from pretrain.objectives.base import Objective
from pretrain.parallel import processes
from pretrain.parallel.engine import Engine
from pretrain.recipes.recipe import Recipe


def missing_exports(run: Path, step: int, engine: Engine) -> list[Path]:
    """The folders of the exports of a step, of all `Objective.exports()`, that are not complete yet."""
    folders = export.folders(run / "export" / str(step), engine.objective).values()
    return [folder for folder in folders if not (folder / "config.json").is_file()]


def write_exports(
    cfg: Recipe,
    run: Path,
    step: int,
    engine: Engine,
    stream: Stream,
    writer: Writer,
    say: Callable[[str], None],
) -> None:
    """Write the exports of a step that are missing, and the objective's pictures. Collective: every rank must call it.

    If an export cannot be written, this is logged, and the run continues without it. At the last step it raises
    UserError; the same command then tries again.
    """
    if processes.on_rank_0(lambda: bool(missing_exports(run, step, engine))):
        _write_missing(cfg, run, step, engine, say)
    if type(engine.objective).pictures is not Objective.pictures:
        _write_pictures(run, step, engine, stream, writer, say)


def _write_missing(cfg: Recipe, run: Path, step: int, engine: Engine, say: Callable[[str], None]) -> None:
    folder = run / "export" / str(step)
    states = engine.encoder_states()
    tokenizer = run / TOKENIZER if (run / TOKENIZER).is_file() else None

    def save() -> str:
        """Returns an error message, or ""."""
        try:
            export.save(folder, engine.objective, cfg, step, states, tokenizer)
        except (OSError, SafetensorError) as error:
            return f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})"
        return ""

    problem = processes.on_rank_0(save)
    if problem and step == cfg.steps:
        raise processes.raised_by_all(UserError(f"{problem}; make room, then run the same command again"))
    if problem:
        say(f"{problem}; the run continues without this export")


def _write_pictures(
    run: Path, step: int, engine: Engine, stream: Stream, writer: Writer, say: Callable[[str], None]
) -> None:
    """Write the objective's pictures of the first batch of the run. It is the same batch at every export, so that the
    pictures can be compared."""
    pictures = engine.pictures(placed(engine.objective, stream.first(), engine.device))
    if not writer.writes:
        return
    for name, picture in pictures.items():
        path = run / "pictures" / f"{name}-{step:09d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(path)
        except OSError as error:
            say(f"{path}: cannot be written ({error.strerror or error}); the run continues without this picture")
        writer.board.add(operator.methodcaller("add_image", name, picture, step))
