"""Checks of a recipe's `parallel.*` options for a number of processes, for `unlabeled plan` and the engines.

Nothing here imports torch, except `_check_optimizer` with ZeRO or offloading.
"""

from __future__ import annotations

import math

from common.config import ConfigError
from pretrain.optim import optimizers
from pretrain.recipes.recipe import Recipe


def check(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError for combinations that no engine supports."""
    parallel, batch = recipe.parallel, recipe.data.batch
    mode, replicate = parallel.mode, parallel.replicate
    if mode == "single" and processes > 1:
        raise ConfigError(
            f"parallel.mode = single is one process, not {processes}; write parallel.mode=ddp, fsdp2, zero1, zero2 or zero3"
        )
    if batch % processes:
        fitting = max(1, round(batch / processes)) * processes
        raise ConfigError(f"data.batch = {batch}: {processes} processes do not divide it; write data.batch={fitting}")
    if replicate != 1 and mode != "fsdp2":
        raise ConfigError(f"parallel.replicate = {replicate}: only fsdp2 has replicas; parallel.mode is {mode}")
    if replicate < 1 or processes % replicate:
        raise ConfigError(
            f"parallel.replicate = {replicate}: {processes} processes do not divide into so many replicas"
        )
    if parallel.offload and mode in ("single", "ddp"):
        raise ConfigError(
            f"parallel.offload = true: {mode} keeps everything on the device; write parallel.mode=fsdp2 or zero2"
        )
    if parallel.frozen == "replicated" and mode != "fsdp2":
        cuts = "shards all parameters" if mode == "zero3" else "shards no parameters, so that it has no effect"
        raise ConfigError(f"parallel.frozen = replicated: {mode} {cuts}; take it out, or write parallel.mode=fsdp2")
    _check_optimizer(recipe)
    _check_rows(recipe, processes)
    if recipe.precision == "fp16" and mode.startswith("zero"):
        raise ConfigError(f"precision = fp16: {mode} has fp32 and bf16; or write parallel.mode=ddp or fsdp2")


def collective_timeout(recipe: Recipe) -> float:
    """Seconds that a rank waits for another after the first step: `parallel.timeout`, and where shards are remote
    `data.fetch.retry_seconds` more, because a rank without data is not stuck while its store is asked again."""
    from data_pipeline.storage.urls import is_local  # imports fsspec

    data = recipe.data
    remote = not all(map(is_local, [*data.train, *(shards for source in data.mix for shards in source.shards)]))
    return recipe.parallel.timeout + (data.fetch.retry_seconds if remote else 0.0)


def stall_seconds(recipe: Recipe, processes: int) -> float:
    """Seconds without a batch before all stacks are written: `data.fetch.stall_seconds`, but with several processes at
    most half of `collective_timeout`, which ends them."""
    own = recipe.data.fetch.stall_seconds
    return own if processes == 1 else min(own, collective_timeout(recipe) / 2)


def fitting(recipe: Recipe, processes: int, samples: int) -> str:
    """The overrides with which the largest batch of at most `samples` divides over processes, micro-batches and the
    objective's groups."""
    micro, (group, without) = recipe.parallel.micro_batch, recipe.objective.rows()
    more = []
    if micro is not None and micro * processes > samples:
        micro, more = None, ["parallel.micro_batch=null"]
    unit = processes * micro if micro is not None else math.lcm(processes, group)
    if unit > samples:
        unit, more = processes, [*more, *([without] if without else [])]
    return " ".join([f"data.batch={max(1, samples // unit) * unit}", *more])


def _check_optimizer(recipe: Recipe) -> None:
    """Raises ConfigError if the optimizer does not support the mode. Imports torch only with ZeRO or offloading."""
    asked = {"zero": recipe.parallel.mode.startswith("zero"), "offload": recipe.parallel.offload}
    unsupported = optimizers.kind(recipe.optim.name).unsupported if any(asked.values()) else {}
    for what, why in unsupported.items():
        if asked[what]:
            fsdp2 = "parallel.mode=fsdp2 without offload" if "offload" in unsupported else "parallel.mode=fsdp2"
            raise ConfigError(f"optim.name = {recipe.optim.name}: {why}; write {fsdp2}, or optim.name=adamw")


def _check_rows(recipe: Recipe, processes: int) -> None:
    """Check the samples in one forward, over all ranks, against the objective's options, in each phase."""
    micro = recipe.parallel.micro_batch
    for batch in [recipe.data.batch, *(phase.batch for phase in recipe.data.phases if phase.batch)]:
        rows = batch if micro is None else micro * processes
        what = f"data.batch = {batch}" if micro is None else f"micro-batches of {micro} on {processes} processes"
        try:
            recipe.objective.check_rows(rows, what)
        except ValueError as error:
            raise ConfigError(str(error)) from None
