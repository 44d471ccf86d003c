"""The work before the first step of a run: replace the recipe's `auto` values, load weights, and resume from a
checkpoint."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import build_config, output
from common.errors import ConfigError, Damaged, UserError
from common.schedules import Schedule
from data_pipeline.build.stats import summarize
from data_pipeline.build.tokenizer import write_folder
from data_pipeline.parts.label import Label
from data_pipeline.shards.dataset import Dataset, store_manifests
from data_pipeline.shards.samples import Samples
from data_pipeline.stream.stream import Stream
from pretrain import image_folders
from pretrain.build import build_objective, placed, stored_pixels
from pretrain.checkpoint.load import is_latest, load
from pretrain.checkpoint.save import Saver
from pretrain.checkpoint.store import Store
from pretrain.estimate import plan
from pretrain.estimate.hardware import peak
from pretrain.interchange import load_record
from pretrain.interchange.teachers import checkpoint_recipe
from pretrain.interchange.weight_sources import source_about
from pretrain.objectives.base import Objective
from pretrain.optim.skip_steps import Guard
from pretrain.parallel import fsdp2, processes
from pretrain.parallel.device import faster_precision, precision_of
from pretrain.parallel.engine import Engine
from pretrain.recipes import defaults
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.recipe_file import write_recipe
from pretrain.run_log import Log, frozen_parts

MAX_SEEN = 8  # images of a dataset from which `log_normalisation` judges
# Its normalised pixels have means up to MAX_OFFSET, and the largest deviation is from 1 / MAX_SPREAD to MAX_SPREAD.
MAX_OFFSET, MAX_SPREAD = 10.0, 100.0


def convert_image_folders(cfg: Recipe) -> None:
    """Replace folders of images in the recipe by shards that are built from them. Called before the process group
    exists, because building may take longer than its time-out of half an hour. Collective: every rank must call it; an
    error on one rank is raised on all."""
    error: UserError | None = None
    try:
        image_folders.use_shards(cfg, output.say if processes.rank() == 0 else lambda line: None)
    except UserError as own:
        error = own

    def raise_own() -> None:
        if error is not None:
            raise error

    processes.on_every_rank(raise_own)  # after the build, because a rank waits for the others for half an hour at most


def log_datasets(samples: Sequence[Dataset], say: Log) -> None:
    """Log a summary of each dataset of images; there is none for text."""
    images = [dataset for dataset in samples if not dataset.length]
    lines = processes.on_rank_0(lambda: [line for dataset in images for line in summarize(dataset)])
    for line in lines:
        say(line)


def log_normalisation(cfg: Recipe, samples: Sequence[Dataset], say: Log) -> None:
    """Log a line for each dataset of images whose pixels, of float32, are far from `data.mean` and `data.std`: the model
    would see them as nearly equal, or as very large numbers."""
    data = vars(cfg.data)  # `vars` does not mark the keys as read
    if data["pixel_dtype"] == "float32":
        for line in processes.on_rank_0(lambda: [*map(_unfitting, samples, itertools.repeat(data))]):
            if line:
                say(line)


def _unfitting(dataset: Dataset, data: dict[str, Any]) -> str:
    """The line of `log_normalisation` for a dataset; "" if its first images fit, or if there are none."""
    if not isinstance(dataset, Samples):
        return ""
    channels = len(data["mean"])
    sums = np.zeros((3, channels))  # of ones, of the pixels, and of their squares
    for number in range(min(len(dataset), MAX_SEEN)):
        with contextlib.suppress(Damaged):
            x = dataset.image(number, channels, dtype="float32").reshape(-1, channels)
            sums += np.full(channels, len(x)), x.sum(0, np.float64), np.einsum("nc,nc->c", x, x, dtype=np.float64)
    if not sums[0].any():
        return ""
    mean = sums[1] / sums[0]
    spread = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 0)) / data["std"]
    offset = np.abs((mean - data["mean"]) / data["std"]).max()
    if offset <= MAX_OFFSET and 1 / MAX_SPREAD <= spread.max() <= MAX_SPREAD:
        return ""
    return (
        f"{dataset.names}: with data.mean and data.std, its pixels have means up to {offset:.3g} and deviations"
        f" up to {spread.max():.3g}, which should be about 0 and 1; write those that `unlabeled shards"
        f" stats {dataset.names}` prints, and scale datasets of different units before you mix them"
    )


def settle_auto_values(cfg: Recipe, run: Path, samples: Sequence[Dataset], device: torch.device, say: Log) -> None:
    """Replace the recipe's `auto` values by those that their rules give for these data and this device, and store the
    recipe."""
    classes = len(Label().about(samples, cfg.model)["classes"])
    pixels: Any = processes.on_rank_0(lambda: stored_pixels(cfg, samples))
    lines = defaults.settle(cfg, sum(map(len, samples)), checkpoint_recipe, source_about, classes, pixels)
    for line in lines:
        say(line)
    precision: Any = processes.on_rank_0(lambda: precision_of(device)) if cfg.precision == "auto" else None
    cfg.precision = precision or cfg.precision
    if lines or precision:
        processes.on_rank_0(lambda: write_recipe(cfg, run))


def measure_precision(cfg: Recipe, run: Path, objective: Objective, stream: Stream, device: torch.device) -> None:
    """If `precision` is still `auto`, measure which precision is faster, and store it in the recipe."""
    if cfg.precision != "auto":
        return
    batch = placed(objective, stream.first(), device)
    measured: Any = faster_precision(objective, batch)  # on every rank, because the loss may have collectives
    cfg.precision = processes.on_rank_0(lambda: measured)
    processes.on_rank_0(lambda: write_recipe(cfg, run))


def build_and_log_objective(cfg: Recipe, start: bool, say: Log) -> Objective:
    """The recipe's objective. With `start`, the weights that the recipe names are loaded, and their source is
    logged."""
    with load_record.record_loading() as loaded:
        objective = processes.on_every_rank(lambda: build_objective(cfg, start=start, empty=fsdp2.starts_empty(cfg)))
    pixels = vars(cfg.data)  # `vars` does not mark the keys as read: a mean in a recipe for text must remain an error
    for line in [*load_record.report_loaded(loaded, pixels["mean"], pixels["std"]), *frozen_parts(cfg, objective)]:
        say(line)
    return objective


def check_plans(stream: Stream) -> None:
    """Raises UserError, on all ranks, if the ranks have different plans: those of batches by budget depend on the lengths
    of recordings, which each machine measures if the shards do not state them. Collective."""
    plans = processes.gather(stream.plan.constants())
    if len({*plans}) > 1:
        names = ", ".join(samples.names for samples in stream.samples)
        raise processes.raised_by_all(
            UserError(
                f"{names}: ranks have measured different lengths of recordings, with different versions of FFmpeg;"
                " run `unlabeled shards index FOLDER` once, which stores the lengths beside the index"
            )
        )


def store_data_files(samples: Sequence[Dataset], objective: Objective, run: Path) -> None:
    """Store in the run folder what later stages need from the data: the manifest of each dataset, and the tokenizer,
    which is copied into exports."""
    processes.on_rank_0(lambda: store_manifests(samples, run / "data"))
    known = [samples[0].vocabulary, *(part.vocabulary for part in objective.parts.values())]
    for vocabulary in known:
        if vocabulary is not None:
            processes.on_rank_0(functools.partial(write_folder, str(run), vocabulary))


def resume(
    run: Path, found: tuple[Store, str] | None, saver: Saver, engine: Engine, stream: Stream, guard: Guard, say: Log
) -> int:
    """Load the checkpoint `found`, if there is one. Returns the step to train next."""
    if found is None:
        return 0
    store, name = found
    if int(name) > saver.recipe.steps:
        raise processes.raised_by_all(
            UserError(
                f"steps = {saver.recipe.steps}: the run begins at step {int(name)}, from {store.path(name)}; write"
                f" steps=N with more than {int(name)}, or checkpoint.resume= with an earlier step"
            )
        )
    step = load(store, name, engine, stream, guard=guard)
    if store.url == saver.store.url and processes.on_rank_0(lambda: is_latest(store, name)):
        saver.newest = name
    say(f"{run}: resumes from step {step} ({store.path(name)})")
    stored_schedule = store.run_json(name)["recipe"]["optim"]["lr"]
    stored_lr = build_config.build(Schedule, stored_schedule, {"": store.path(name)})(step)
    lr = saver.recipe.optim.lr(step)
    if not math.isclose(lr, stored_lr, rel_tol=1e-6):  # for example if a new run begins at a checkpoint in the decay
        say(f"optim.lr is {lr:.4g} at step {step}; in the run of the checkpoint it was {stored_lr:.4g}")
    return step


def flops_and_peak(cfg: Recipe, run: Path, engine: Engine, say: Log) -> tuple[float, float]:
    """(FLOPs of a step, peak FLOP/s of all devices), logged; zeros if the objective's FLOPs cannot be traced. Rank 0
    traces and measures them."""

    def measured() -> tuple[float, float]:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by copies of parameters
        try:
            flops = plan.step_flops(cfg, run)
        except ConfigError as error:
            say(f"FLOP/s will not be logged: {error}")
            return 0.0, 0.0
        rate, source = peak(engine.device, cfg.precision)
        say(f"mfu is relative to {rate / 1e12:.3g} TFLOP/s per process, {source}")
        return flops, engine.world * rate

    return processes.on_rank_0(measured) if cfg.log.flops else (0.0, 0.0)
