"""Check a recipe's `parallel.*` options for a number of processes, before a run starts and for `unlabeled plan`.

This module does not import torch, except in `_check_optimizer` with ZeRO or offloading.
"""

from __future__ import annotations

import math

from common.errors import ConfigError
from pretrain.optim import optimizers
from pretrain.recipes.recipe import Recipe
from pretrain.recipes.sections import Seconds


def check(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError for combinations that no engine supports."""
    parallel, batch = recipe.parallel, recipe.data.batch_size
    mode, replicate = parallel.mode, parallel.replicate
    if mode == "single" and processes > 1:
        raise ConfigError(
            f"parallel.mode = single is one process, not {processes}; write parallel.mode=ddp, fsdp2, zero1,"
            " zero2 or zero3"
        )
    if batch % processes and recipe.data.budget is None:
        nearest_batch = max(1, round(batch / processes)) * processes
        raise ConfigError(
            f"data.batch = {batch}: {processes} processes do not divide it; write data.batch={nearest_batch}"
        )
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
        why = "shards all parameters" if mode == "zero3" else "shards no parameters, so that it has no effect"
        raise ConfigError(f"parallel.frozen = replicated: {mode} {why}; remove it, or write parallel.mode=fsdp2")
    _check_optimizer(recipe)
    _check_rows(recipe, processes)
    if recipe.precision == "fp16" and mode.startswith("zero"):
        raise ConfigError(f"precision = fp16: {mode} has fp32 and bf16; or write parallel.mode=ddp or fsdp2")


def collective_timeout(recipe: Recipe) -> float:
    """Seconds that a rank waits for another after the first step: `parallel.timeout`, plus `data.fetch.retry_seconds`
    if shards are remote, because a rank whose requests to a store are tried again is not stuck."""
    from data_pipeline.storage.urls import is_local  # imports fsspec

    data = recipe.data
    remote = not all(map(is_local, [*data.train, *(shards for source in data.mix for shards in source.shards)]))
    return recipe.parallel.timeout + (data.fetch.retry_seconds if remote else 0.0)


def stall_seconds(recipe: Recipe, processes: int) -> float:
    """Seconds without a batch before all stacks are written: `data.fetch.stall_seconds`, but with several processes at
    most half of `collective_timeout`, after which the processes are ended."""
    seconds = recipe.data.fetch.stall_seconds
    return seconds if processes == 1 else min(seconds, collective_timeout(recipe) / 2)


def micro_batch_size(recipe: Recipe) -> int | None:
    """`parallel.micro_batch` as a number of samples; of a budget, the number of recordings of `data.seconds` that it
    holds. None if it is null."""
    micro = recipe.parallel.micro_batch
    return max(1, int(micro.seconds // recipe.data.seconds)) if isinstance(micro, Seconds) else micro


def micro_batches(recipe: Recipe, processes: int) -> int:
    """The number of micro-batches per step and process: 1 if a process's share of the batch is not larger than
    `parallel.micro_batch`, or if that is null; else the quotient of the two, rounded up if they are budgets. Raises
    ConfigError if it is no whole number."""
    batch, micro, budget = recipe.data.batch_size, recipe.parallel.micro_batch, recipe.data.budget
    if isinstance(micro, Seconds):
        assert budget is not None  # `Recipe.check`
        return math.ceil(budget.seconds / (processes * micro.seconds))
    share = batch // processes
    if micro is None or batch % processes or share <= micro:  # `check` refuses the second
        return 1
    if share % micro:
        fit = next(n for n in range(micro, 0, -1) if share % n == 0)
        raise ConfigError(
            f"parallel.micro_batch = {micro}: data.batch = {batch} over {processes} processes does not divide into"
            f" micro-batches; write parallel.micro_batch={fit}"
        )
    return share // micro


def fitting_batch(recipe: Recipe, processes: int, samples: int) -> str:
    """Overrides that set the largest batch of at most `samples` which can be divided into processes, micro-batches and
    the objective's groups of samples; an override that removes the groups is added where even one is too large."""
    micro, (group, without_groups) = micro_batch_size(recipe), recipe.objective.rows()
    further = []
    divided = processes * micro if micro is not None else 0
    divisor = divided if 0 < divided <= samples else math.lcm(processes, group)
    if divisor > samples:
        divisor = processes
        further = [without_groups] if without_groups else []
    return " ".join([f"data.batch={max(1, samples // divisor) * divisor}", *further])


def _check_optimizer(recipe: Recipe) -> None:
    """Raises ConfigError if the optimizer does not support the mode. Imports torch only with ZeRO or offloading."""
    used = {"zero": recipe.parallel.mode.startswith("zero"), "offload": recipe.parallel.offload}
    unsupported = optimizers.optimizer_class(recipe.optim.name).unsupported if any(used.values()) else {}
    for feature, why in unsupported.items():
        if used[feature]:
            fsdp2 = "parallel.mode=fsdp2 without offload" if "offload" in unsupported else "parallel.mode=fsdp2"
            raise ConfigError(f"optim.name = {recipe.optim.name}: {why}; write {fsdp2}, or optim.name=adamw")


def _check_rows(recipe: Recipe, processes: int) -> None:
    """Check whether the number of samples in one forward, over all ranks, fits the objective's options in each
    phase."""
    micro = micro_batch_size(recipe)
    for batch in [recipe.data.batch_size, *(phase.batch for phase in recipe.data.phases if phase.batch)]:
        rows = batch if micro is None else min(batch, micro * processes)
        what = f"data.batch = {batch}" if rows == batch else f"micro-batches of {micro} on {processes} processes"
        try:
            recipe.objective.check_rows(rows, what)
        except ValueError as error:
            raise ConfigError(str(error)) from None
