"""Checkpoint: a DCP folder with weights, optimizer state and the stream's position. It appears under its name only when it is whole."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.api

from data_pipeline.stream import Stream
from pretrain import config
from pretrain.errors import UserError
from pretrain.parallel.engine import Engine
from pretrain.recipe import Recipe

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs no process group


def save(run: Path, step: int, engine: Engine, stream: Stream, recipe: Recipe) -> Path:
    """Write run/checkpoints/STEP and delete the oldest beyond `checkpoint.keep`."""
    folder = run / "checkpoints" / f"{step:09d}"
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dcp.save(engine.state_dict(), checkpoint_id=partial, no_dist=True)
        about = {
            "step": step,
            "stream": stream.state_dict(),
            "recipe": config.to_dict(recipe),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        }
        (partial / "run.json").write_text(json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{partial}: cannot write the checkpoint ({error.strerror or error}); the one before it is kept"
        ) from None
    partial.rename(folder)
    for old in sorted(all_of(run))[: -recipe.checkpoint.keep or None]:
        shutil.rmtree(old)
    return folder


def all_of(run: Path) -> list[Path]:
    """The whole checkpoints of a run."""
    return [p.parent for p in (run / "checkpoints").glob("[0-9]*/.metadata") if (p.parent / "run.json").is_file()]


def latest(run: Path) -> Path | None:
    return max(all_of(run), default=None)


def about(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, stream position, recipe, versions."""
    return json.loads((folder / "run.json").read_text())


def load(folder: Path, engine: Engine, stream: Stream) -> int:
    """Restore engine and stream; the step to go on with."""
    state = engine.state_dict()
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    except (
        Exception,
        dcp.api.CheckpointException,
    ) as error:  # whatever a damaged file raises; DCP's own is no Exception
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(
            f"{folder}: cannot be loaded ({reason[0]}); delete this folder to go on from the one before it"
        ) from None
    engine.load_state_dict(state)
    stream.load_state_dict(about(folder)["stream"])
    return about(folder)["step"]


def load_model(folder: Path, module: torch.nn.Module) -> None:
    """Restore an objective's weights alone."""
    state = {"model": module.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    module.load_state_dict(state["model"])
