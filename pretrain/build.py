"""Build the objects of a run from its recipe: the objective with its model, datasets, phases and the stream."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from data_pipeline.order.budget import BatchBudget
from data_pipeline.order.schedule import Phase
from data_pipeline.parts.part import About, Part
from data_pipeline.shards.dataset import Dataset
from data_pipeline.stream.damage_log import DamageLog
from data_pipeline.stream.stream import Reading, Stream, default_workers, to_device
from data_pipeline.stream.worker import collated
from data_pipeline.stream.worker_processes import start_method
from pretrain.interchange import load_record, weights
from pretrain.interchange.teachers import checkpoint_recipe
from pretrain.interchange.weight_sources import source_about
from pretrain.models.build import build_model
from pretrain.models.layers import Backbone
from pretrain.objectives.base import Objective
from pretrain.objectives.finder import config_class, find
from pretrain.objectives.options import Options
from pretrain.ops.queue import Queue
from pretrain.parallel import processes
from pretrain.parallel.engine import accumulation
from pretrain.recipes import defaults, parallel_checks
from pretrain.recipes.recipe import Recipe


def build_objective(cfg: Recipe, start: bool = False, empty: bool = False) -> Objective:
    """The recipe's objective on the CPU, initialised from the recipe's seed. Raises ConfigError for options that do not
    fit together.

    `start`: also load the weights that `init` and the objective's options name. `empty`: build it on the meta device,
    for an engine that gets the weights from rank 0.
    """
    defaults.settle(
        cfg, recipe_of=checkpoint_recipe, about_of=source_about
    )  # no effect if `auto` values were set when the data were opened
    torch.manual_seed(cfg.seed)
    start = start and not empty
    with (
        contextlib.nullcontext() if start else load_record.skip_loading(),
        torch.device("meta") if empty else contextlib.nullcontext(),
    ):
        try:
            cls = find(cfg.objective.name)
            parts = parts_of(cfg, cls)
            objective = cls(cfg.objective, functools.partial(backbone, cfg))
            objective.parts = parts
            _check_queues(cfg, objective)
            if start:
                loaded = weights.load_run(objective, cfg.init.run) if cfg.init.run else set[str]()
                if cfg.init.run and cfg.init.weights == "teacher":
                    objective.start_from_teacher()
                objective.before_first_step(loaded)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return objective


def _check_queues(cfg: Recipe, objective: Objective) -> None:
    """Raises ConfigError if the size of a queue of the objective does not fit a batch of the recipe."""
    queues = [module for module in objective.modules() if isinstance(module, Queue)]
    for batch in _batches(cfg):
        for queue in queues:
            queue.check_batch(batch)


def _batches(cfg: Recipe) -> list[int]:
    """The global batch sizes of the recipe and of its phases."""
    return [cfg.data.batch_size, *(phase.batch for phase in cfg.data.phases if phase.batch)]


def backbone(cfg: Recipe, section: str = "", **changes: Any) -> Backbone:
    """The recipe's model, or the model that the objective's `section` describes, with some options changed.

    The recipe's model gets the weights that `init.backbone` names, and the one of the section `text` those of
    `init.text`.
    """
    body = build_model(getattr(cfg.objective, section) if section else cfg.model, **changes)
    if cfg.init.backbone and not section:
        weights.load_into(body, cfg.init.backbone)
    if section == "text" and cfg.init.text:
        weights.load_text_into(body, cfg.init.text, f"objective.{section}")
    return body


def phases_of(cfg: Recipe, samples: Sequence[Dataset]) -> list[Phase]:
    """The recipe's phases, with every null replaced by the value of the previous phase."""
    mix = cfg.data.mix
    if mix:
        weights = [
            float(len(s)) if source.weight is None else source.weight for s, source in zip(samples, mix, strict=False)
        ]
        phases = [Phase(0, cfg.data.batch_size, tuple(weights), tuple(source.homogeneous for source in mix))]
    else:
        phases = [Phase(0, cfg.data.batch_size, (1.0,), (0.0,))]
    for change in cfg.data.phases:
        last = phases[-1]
        phases.append(
            Phase(
                change.step,
                change.batch or last.batch,
                last.weights if change.weights is None else tuple(change.weights),
                last.homogeneous if change.homogeneous is None else tuple(change.homogeneous),
            )
        )
    return phases


def build_stream(
    cfg: Recipe,
    objective: Objective,
    samples: Sequence[Dataset],
    damage_log: Path | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
) -> Stream:
    """The stream of a recipe's data, for batches that will be copied to `device`."""
    data = cfg.data
    fetch = data.fetch
    if data.budget is None and data.batch_size > (count := sum(map(len, samples))):
        raise ConfigError(
            f"data.batch = {data.batch_size} is more than the {count} samples in {', '.join(s.names for s in samples)};"
            f" write {parallel_checks.fitting_batch(cfg, processes.world(), count)}"
        )
    reading = Reading(
        workers=default_workers(processes.local_world()) if data.workers is None else data.workers,
        threads=data.threads,
        decode_mb=max(part.decode_mb for part in objective.parts.values()),
        ahead_mb=fetch.ahead_mb,
        requests=fetch.requests,
        attempt_seconds=fetch.attempt_seconds,
        retry_seconds=fetch.retry_seconds,
        stall_seconds=parallel_checks.stall_seconds(cfg, processes.world()),
        cache=fetch.cache,
        cache_gb=fetch.cache_gb,
        start_method=start_method(data.start_method, device.type),
        pinned=device.type == "cuda",
    )
    return Stream(
        samples,
        views(cfg, objective, samples),
        data.batch_size,
        cfg.seed,
        data.shuffle,
        rank=processes.rank(),
        world=processes.world(),
        accumulate=accumulation(cfg, objective.is_coupled(), processes.world()),
        phases=phases_of(cfg, samples),
        parts=objective.parts,
        reading=reading,
        damage_log=DamageLog(damage_log, processes.rank(), data.bad_share, data.bad_shard_share),
        budget=BatchBudget(data.budget.seconds, data.seconds, data.budget.buckets) if data.budget else None,
    )


def placed(objective: Objective, batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch of the objective's stream, copied to the device by the `place` of its parts (dtype, normalisation)."""
    return to_device(batch, device, objective.parts, objective.part_of)


# ---------------------------------------------------------------- the data of the objective
def parts_of(cfg: Recipe, cls: type[Objective] | None = None) -> dict[str, Part]:
    """The parts of the recipe's objective, with their options from the sections `data` and `model`.

    `cls`: the class of the objective; None: it is found by its name.
    """
    cls = cls or find(cfg.objective.name)
    check(cfg, cls)
    return {name: part.configured(cfg.data, cfg.model) for name, part in cls.parts.items()}


def open_samples(cfg: Recipe) -> list[Dataset]:
    """The datasets of a recipe: those of `data.mix`, or `data.train` as one. Raises UserError if they lack a part of
    the objective."""
    specs = [source.shards for source in cfg.data.mix] or [cfg.data.train]
    parts = list(parts_of(cfg).values())
    extensions = [extension for part in parts for extension in part.extensions]
    datasets = [parts[0].open(shards, extensions=extensions) for shards in specs]
    for part in parts:
        part.check(datasets, cfg.model)
    return datasets


def stored_pixels(cfg: Recipe, datasets: Sequence[Dataset]) -> str:
    """What `data.pixel_dtype: auto` becomes: the dtype that keeps all bits of the first images of the datasets; "" if the
    option is set, or if the objective reads no images."""
    if vars(cfg.data)["pixel_dtype"] != "auto":
        return ""
    found = (part.stored_pixels(datasets) for part in parts_of(cfg).values())
    return next(filter(None, found), "")


def about(cfg: Recipe, objective: Objective, datasets: Sequence[Dataset] | None = None) -> About:
    """What the objective's `views` may have to know. Without `datasets`, as for a plan, a stand-in with the model's
    vocabulary size replaces the vocabulary of the tokenizer."""
    known = objective.encoder().about()
    for part in objective.parts.values():
        known |= part.about(datasets, cfg.model)
    return About(**known)


class Views:
    """The function that an objective's `views` returns, which makes the arrays of one sample, in a form that can be
    pickled.

    The function itself is defined inside another one, so that it cannot be pickled. A data worker that is not forked
    from the trainer gets the arguments of `views` instead, and calls `views` again.
    """

    def __init__(self, cfg: Options, about: About):
        self.arguments = (cfg, about)
        self.view = find(cfg.name).views(cfg, about)

    def __call__(self, sample: dict[str, Any], rng: Any) -> dict[str, np.ndarray]:
        return self.view(sample, rng)

    def collate(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return collated(self.view, arrays)

    def __reduce__(self) -> tuple[Callable[..., Views], tuple[str, bytes]]:
        return _unpickled_views, (self.arguments[0].name, pickle.dumps(self.arguments))


def _unpickled_views(name: str, arguments: bytes) -> Views:
    config_class(name)  # executes the objective's file, which defines the class of the pickled options
    return Views(*pickle.loads(arguments))


def views(cfg: Recipe, objective: Objective, datasets: Sequence[Dataset] | None = None) -> Views:
    """The function that makes the arrays of one sample. Raises ConfigError for sizes that do not fit the model."""
    try:
        return Views(cfg.objective, about(cfg, objective, datasets))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def noise_samples(cfg: Recipe, objective: Objective, count: int) -> list[dict[str, np.ndarray]]:
    """The arrays that the objective's views make from `count` random samples, for batches without data."""
    make, known, rng = views(cfg, objective), about(cfg, objective), np.random.default_rng(0)
    out = []
    for n in range(count):
        sample = {"id": n, "epoch": 0, "slot": n, "batch": count, "step": 0, "seed": cfg.seed}
        for name, part in objective.parts.items():
            sample |= part.stand_in(name, rng, known)
        made = make(sample, lambda k, n=n: np.random.default_rng([n, k]))
        # torch does not accept arrays with negative strides (np.rot90), which data workers copy as well.
        out.append({key: np.array(value, order="C") for key, value in made.items()})
    return out


def noise_batch(cfg: Recipe, objective: Objective, count: int) -> dict[str, Tensor]:
    """A micro-batch of `count` random samples, on the host."""
    samples = noise_samples(cfg, objective, count)
    arrays = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    arrays |= collated(views(cfg, objective), arrays)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def check(cfg: Recipe, cls: type[Objective]) -> None:
    """Raises ConfigError for a model that reads a part that the objective does not have, and for a batch that is too
    small for its loss."""
    micro, world = parallel_checks.micro_batch_size(cfg), processes.world()
    if cfg.data.budget is not None and not cls.any_length:
        raise ConfigError(
            f"data.batch = {{seconds: {cfg.data.budget.seconds:g}}}: {cfg.objective.name} takes samples of one length;"
            f" write a number of samples, such as data.batch={cfg.data.batch_size}"
        )
    for batch in _batches(cfg):
        key, rows = ("data.batch", batch) if micro is None else ("parallel.micro_batch", min(batch, micro * world))
        if rows < cls.least_batch:
            raise ConfigError(
                f"{key} = {rows}: {cfg.objective.name} compares samples with others of their batch; write"
                f" {cls.least_batch} or more"
            )
    if cfg.model.reads not in cls.parts:
        raise ConfigError(
            f"objective.name = {cfg.objective.name}: trains on {', '.join(cls.parts)}, but"
            f" model.name = {cfg.model.name} reads {cfg.model.reads};"
            " choose a model that fits (`unlabeled recipes` shows pairs that go together), or name the part that the model"
            f" gets {cfg.model.reads!r} in `parts`"
        )
