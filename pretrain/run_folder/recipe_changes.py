"""Find the differences between the recipe of a run and that of a command which resumes it. Allowed are all differences
that do not affect a step which the run has already trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import build_config, config, output, yaml_values
from common.schedules import Schedule
from pretrain.recipes import defaults
from pretrain.recipes.recipe import Recipe
from pretrain.run_folder.jsonl_rows import read_rows

if TYPE_CHECKING:
    from pretrain.checkpoint.store import Store

# Prefixes of keys that change no number of the training, so that they may differ when a run is resumed.
MAY_CHANGE = (
    "device",
    "parallel.mode",
    "parallel.replicate",
    "parallel.frozen",
    "parallel.recompute",
    "parallel.compile",
    "parallel.offload",
    "parallel.timeout",
    "parallel.attention",
    "skip.most",
    "run",
    "overwrite",
    "threads",
    "log.",
    "checkpoint.",
    "export.",
    "eval.",
    "data.workers",
    "data.threads",
    "data.start_method",
    "data.decode_mb",
    "data.fetch.",
    "data.bad_",
)
# Prefixes of keys that may differ when a new run starts from a checkpoint of this one (`checkpoint.resume`): its
# weights, optimizer state and data order can still be used.
MAY_CHANGE_IN_NEW_RUN = (
    *("steps", "optim.lr.", "optim.weight_decay.", "optim.beta", "optim.eps", "optim.clip", "data.phases", "skip."),
)
COMPARED_STEPS = 1000  # approximate number of steps at which two schedules are compared
MAX_NAMED_CHANGES = 4  # in an error message


def changes_of_trained_steps(old: Recipe, new: Recipe, store: Store) -> list[str]:
    """The differences between two recipes, "key: old → new", that would change a step which the run has already
    trained. Phases of the data, schedules and the number of steps may differ in later steps. `store` holds the run's
    checkpoints."""
    # without user names and secrets in URLs, which do not change the data
    before, after = (yaml_values.each_text(config.to_dict(recipe), output.drop_secrets) for recipe in (old, new))
    _ignore_unused_datasets(before, after)
    if (Path(new.run) / "data" / "0.json").is_file():
        _ignore_places_of_data(before["data"], after["data"])
    if not after["parallel"]["accumulate_coupled"]:  # otherwise the loss depends on the size of the micro-batches
        before["parallel"] = after["parallel"]
    if not _differences(before, after):
        return []
    saved = max(map(int, store.complete_names()), default=0)
    rows = read_rows(Path(new.run) / "metrics.jsonl")  # there may be rows of steps after the last checkpoint
    trained = max(saved, max((row["step"] + 1 for row in rows), default=0))
    for recipe in (before, after):
        recipe["data"]["phases"] = [phase for phase in recipe["data"]["phases"] if phase["step"] < saved]
    _ignore_later_schedules(before, after, trained)
    if after["steps"] >= trained:
        before["steps"] = after["steps"]
    return _differences(before, after)


def refusal(run: Path, changes: list[str], store: Store) -> str:
    """The error message that refuses to resume a run with such changes, and says what to write instead."""
    named = "; ".join(changes[:MAX_NAMED_CHANGES]) + (" …" if len(changes) > MAX_NAMED_CHANGES else "")
    complete = store.complete_names()
    keys = [change.partition(":")[0] for change in changes]
    can_branch_off = all(key.startswith(MAY_CHANGE_IN_NEW_RUN) or key.endswith(".steps") for key in keys)
    from_checkpoint = (
        f"start a new run from its checkpoint with checkpoint.resume={store.path(complete[-1])} run=NEW, or "
        if complete and can_branch_off
        else ""
    )
    return (
        f"{run}: holds a run of another recipe ({named}); {from_checkpoint}start in another folder with run=FOLDER,"
        " or delete that run with overwrite=true"
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The differences between two recipes, except for keys that change no number of the training."""
    return [d for d in yaml_values.differences(before, after) if not d.startswith(MAY_CHANGE)]


def _ignore_unused_datasets(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Remove from `after` the datasets that were added to the end of `data.mix` with weight 0, for a later phase."""
    old, new = before["data"]["mix"], after["data"]["mix"]
    added = new[len(old) :]
    if old and all(source["weight"] is not None and not source["weight"] for source in added):
        after["data"]["mix"] = new[: len(old)]


def _ignore_places_of_data(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Copy the paths and URLs of the data to `before`, as they may have been moved. The run folder holds their manifests:
    `store_manifests` refuses other data before the first step."""
    if before["train"] and after["train"]:
        before["train"] = after["train"]
    for old, new in zip(before["mix"], after["mix"], strict=False):
        old["shards"] = new["shards"]


def _ignore_later_schedules(before: dict[str, Any], after: dict[str, Any], steps: int) -> None:
    """Copy to `before` each schedule of `after` that differs from it only after the first `steps` steps. Long runs are
    compared at about COMPARED_STEPS steps."""
    for key, new in after.items():
        old = before.get(key)
        if not isinstance(new, dict) or not isinstance(old, dict) or old == new:
            continue
        if new.keys() == old.keys() == config.fields(Schedule).keys():
            if _agree(old, new, steps):
                before[key] = new
        else:
            _ignore_later_schedules(old, new, steps)


def _agree(old: dict[str, Any], new: dict[str, Any], steps: int) -> bool:
    """Whether two schedules have the same values in the first `steps` steps. False if a value is still "auto"."""
    if defaults.AUTO in (old["value"], old["warmup"], new["value"], new["warmup"]):
        return False
    old_schedule, new_schedule = (build_config.build(Schedule, values, {}) for values in (old, new))
    compared = {*range(0, steps, max(1, steps // COMPARED_STEPS)), max(0, steps - 1)}
    return all(old_schedule(step) == new_schedule(step) for step in compared)
