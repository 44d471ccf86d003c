"""What a recipe's `auto` becomes: values of self-distillation that depend on how much data, how many steps and which batch there are.

The published recipes are for a million images and batches of thousands; these rules meet them there, and shrink with the data, the batch and the run. They
are rules of thumb: the lines that `settle` returns say what was chosen and by which rule, and the stored recipe has the values.
"""

from __future__ import annotations

import math
from typing import Any

from pretrain.config import Section, fields
from pretrain.recipe import Recipe
from pretrain.schedules import Schedule

AUTO = "auto"
WIDTHS = {192: 0.0, 384: 0.1, 768: 0.2, 1024: 0.3}  # drop path by the backbone's width in long runs; wider: 0.4


def prototypes(samples: int, batch: int) -> int:
    """A twentieth of the samples (65,536 for ImageNet's 1.28 M), at most 64 per sample of a batch (DINOv3: 262,144 of 4,096), a power of two from 256 on."""
    wanted = max(256, min(samples / 20, 64 * batch, 262144))
    return 2 ** round(math.log2(wanted))


def prototypes_of(run: str) -> int | None:
    """As many as the run has that this one starts from."""
    if not run:
        return None
    from pretrain.teachers import recipe_of

    return recipe_of(run)["objective"].get("prototypes")


def momentum(steps: int, batch: int) -> float:
    """0.996 for a batch of 1,024 (DINO) and the same half-life in samples for others, but at least twenty half-lives or so in the run; below 0.95 never."""
    return 1 - min(0.05, max(0.004 * batch / 1024, 20 / steps, 1e-4))


def warmup(steps: int, batch: int, samples: int) -> int:
    """Ten epochs, at most a tenth of the run."""
    return max(1, round(min(steps / 10, 10 * samples / batch)))


def temperature(steps: int, batch: int, samples: int) -> dict[str, Any]:
    """From 0.04 to 0.07 over thirty epochs, at most three tenths of the run; with less than 100,000 samples only to 0.05."""
    length = max(1, round(min(0.3 * steps, 30 * samples / batch)))
    return {"value": 0.07 if samples >= 100_000 else 0.05, "start": 0.04, "warmup": float(length)}


def drop_path(width: int, steps: int, batch: int, samples: int) -> float:
    """By width, in runs of 100 epochs or more; half of it in runs of 30; none in shorter ones."""
    epochs = steps * batch / samples
    rate = next((rate for w, rate in WIDTHS.items() if width <= w), 0.4)
    return rate if epochs >= 100 else rate / 2 if epochs >= 30 else 0.0


def settle(cfg: Recipe, samples: int | None = None) -> list[str]:
    """Put values in place of every `auto` of a recipe; "key = value (rule)" for each. `samples`: of the data; None: not known, so as many as are trained on."""
    steps, batch = vars(cfg)["steps"], vars(vars(cfg)["data"])["batch"]
    count, lines = samples or steps * batch, []

    def put(section: Section, key: str, prefix: str, value: Any, rule: Any) -> None:
        setattr(section, key, value)
        shown = (
            f"{value.value:g} → {value.final:g}" if isinstance(value, Schedule) and value.kind != "constant" else value
        )
        if isinstance(value, Schedule) and value.kind == "constant":
            shown = f"{value.start:g} → {value.value:g} over {value.warmup:g} steps"
        lines.append(f"{prefix}{key} = {shown} (auto: {(rule.__doc__ or '').splitlines()[0].rstrip('.')})")

    objective, model = vars(cfg)["objective"], vars(cfg)["model"]
    own = vars(objective)
    if own.get("prototypes") == AUTO:
        before = prototypes_of(vars(vars(cfg)["init"])["run"])
        value, rule = (before, prototypes_of) if before else (prototypes(count, batch), prototypes)
        put(objective, "prototypes", "objective.", value, rule)
    if own.get("momentum") == AUTO:
        schedule = Schedule(momentum(steps, batch), kind="cosine", final=1.0, steps=steps)
        put(objective, "momentum", "objective.", schedule, momentum)
    if own.get("teacher_temperature") == AUTO:
        values = temperature(steps, batch, count)
        put(objective, "teacher_temperature", "objective.", Schedule(**values, steps=steps), temperature)
    if vars(model).get("drop_path") == AUTO:
        width = vars(model).get("dim") or vars(model)["widths"][-1]
        put(model, "drop_path", "model.", drop_path(width, steps, batch, count), drop_path)
    for key, section in (("optim.lr.", cfg.optim.lr), ("optim.weight_decay.", cfg.optim.weight_decay)):
        if vars(section)["warmup"] == AUTO:
            put(section, "warmup", key, float(warmup(steps, batch, count)), warmup)
    return lines


def keep(old: Section, new: Section) -> None:
    """Where `new` says auto, take what `old`, the recipe of the same run, has settled on."""
    for key in fields(type(new)):
        before, now = vars(old).get(key), vars(new)[key]
        if isinstance(now, Section):
            if isinstance(before, Section) and (before.name, type(before).__name__) == (now.name, type(now).__name__):
                keep(before, now)
        elif now == AUTO and before is not None and key not in ("precision", "device"):
            setattr(new, key, before)
