"""What `parallel.*` of a recipe may say, for so many processes. Nothing here imports torch: `unlabeled plan` and the engines ask alike."""

from __future__ import annotations

from pretrain.config import ConfigError
from pretrain.recipe import Recipe


def check(recipe: Recipe, processes: int) -> None:
    """Raises ConfigError for what no engine does."""
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
        cuts = "cuts all parameters" if mode == "zero3" else "cuts no parameters, so that it has no effect"
        raise ConfigError(f"parallel.frozen = replicated: {mode} {cuts}; take it out, or write parallel.mode=fsdp2")
    if recipe.optim.name == "muon" and (mode.startswith("zero") or parallel.offload):
        what = (
            "DeepSpeed flattens the matrices" if mode.startswith("zero") else "its iteration wants them on the device"
        )
        raise ConfigError(f"optim.name = muon: {what}; write parallel.mode=fsdp2 without offload, or optim.name=adamw")
    _check_koleo(recipe, processes)
    if recipe.precision == "fp16" and mode.startswith("zero"):
        raise ConfigError(f"precision = fp16: {mode} has fp32 and bf16; or write parallel.mode=ddp or fsdp2")


def _check_koleo(recipe: Recipe, processes: int) -> None:
    """KoLeo's groups are of the images that a forward sees, over all processes."""
    options = vars(recipe.objective)
    group, neighbours = options.get("koleo_group"), options.get("koleo_neighbours", 1)
    if group is not None and neighbours >= group:
        raise ConfigError(
            f"objective.koleo_neighbours = {neighbours}: must be less than objective.koleo_group = {group}"
        )
    micro = recipe.parallel.micro_batch
    for batch in [recipe.data.batch, *(phase.batch for phase in recipe.data.phases if phase.batch)]:
        rows = batch if micro is None else micro * processes
        what = f"data.batch = {batch}" if micro is None else f"micro-batches of {micro} on {processes} processes"
        if group is None and neighbours >= max(rows, 2):
            raise ConfigError(f"objective.koleo_neighbours = {neighbours}: must be less than the images of {what}")
        if group is not None and rows % group:
            raise ConfigError(
                f"objective.koleo_group = {group}: does not divide {what}; write one that does, or null for one group of all"
            )
