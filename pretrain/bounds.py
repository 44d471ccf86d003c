"""Which values an option may have, where not every number makes sense: asked as soon as a recipe is read, so that none fails in a data worker or after
the first step. Options of an objective in a file of the user's own are its own business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pretrain.config import ConfigError, Section
from pretrain.schedules import Schedule

Rule = tuple[str, Callable[[float], bool]]  # what a value must be, in words and as a test
SHARE: Rule = ("from 0 to 1", lambda v: 0 <= v <= 1)
PART: Rule = ("above 0 and at most 1", lambda v: 0 < v <= 1)
POSITIVE: Rule = ("above 0", lambda v: v > 0)
COUNT: Rule = ("1 or more", lambda v: v >= 1)
AMOUNT: Rule = ("0 or more", lambda v: v >= 0)

RULES: dict[str, dict[str, Rule]] = {
    "objective": {
        **dict.fromkeys(("flip", "solarize", "blur", "mask_share", "mask_ratio_min", "mask_ratio_max"), SHARE),
        **dict.fromkeys(("global_scale", "local_scale", "crop_scale"), PART),
        **dict.fromkeys(
            ("student_temperature", "teacher_temperature", "temperature", "relation_temperature"), POSITIVE
        ),
        **dict.fromkeys(("prototypes", "head_hidden", "head_bottleneck", "head_outputs"), COUNT),
        **dict.fromkeys(("ibot_prototypes", "ibot_hidden", "ibot_bottleneck"), COUNT),
        **dict.fromkeys(("local_size", "gram_size", "gram_every", "koleo_neighbours"), COUNT),
        **dict.fromkeys(("local_crops", "gram_updates", "z_loss"), AMOUNT),
        "momentum": SHARE,
        "koleo_group": ("2 or more, or null", lambda v: v >= 2),
    },
    "model": {
        **dict.fromkeys(
            ("image_size", "patch_size", "in_channels", "dim", "depth", "heads", "widths", "depths"), COUNT
        ),
        **dict.fromkeys(
            ("vocab_size", "context", "head_dim", "kv_heads", "mlp_width", "segments", "decoder_depth"), COUNT
        ),
        **dict.fromkeys(("mlp_ratio", "rope_base", "norm_eps"), POSITIVE),
        "buckets": ("4 or more", lambda v: v >= 4),
        "registers": AMOUNT,
    },
    "optim": {
        "clip": ("above 0, or null", lambda v: v > 0),
        **dict.fromkeys(("freeze_last_layer", "freeze_backbone", "eps"), AMOUNT),
    },
}
PAIRS = [("mask_ratio_min", "mask_ratio_max"), ("local_scale", "global_scale")]  # of an objective: the first is no more


def check(recipe: Section) -> None:
    """Raises ConfigError for the first option that is out of its bounds."""
    stored = vars(recipe)
    for name, rules in RULES.items():
        if name == "objective" and stored[name].name.endswith(".py"):
            continue
        for key, (words, holds) in rules.items():
            for part, value in _numbers(vars(stored[name]).get(key)):
                if not holds(value):
                    raise ConfigError(f"{name}.{key}{part} = {value}: must be {words}")
    own = vars(stored["objective"])
    if "blur" in own and "local_crops" in own and len(own["blur"]) != 3:
        raise ConfigError(f"objective.blur = {own['blur']}: write three, of the first, the second and the local crops")
    for low, high in PAIRS:
        if low in own and high in own and own[low] > own[high]:
            raise ConfigError(f"objective.{low} = {own[low]}: must be at most objective.{high} = {own[high]}")


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """(what follows the key, number) of every number that a value is made of; of a schedule, those that it takes."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield f"[{n}]", item
    elif isinstance(value, Schedule):
        own = vars(value)
        yield ".value", own["value"]
        if own["kind"] != "constant":
            yield ".final", own["final"]
        if own["warmup"] != 0:
            yield ".start", own["start"]
    elif isinstance(value, int | float):
        yield "", value
