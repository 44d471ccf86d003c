"""What a distillation is made of: a frozen teacher that lies somewhere, with its heads where it has some, and students by their names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pretrain import config, weights
from pretrain.checkpoint_format import fill
from pretrain.checkpoint_tools import locate
from pretrain.errors import UserError
from pretrain.models import presets
from pretrain.models.layers import Backbone


def heads_of(where: str) -> dict[str, tuple[int, int, int, int, bool]]:
    """Arguments of the `PrototypeHead`s that the teacher in a checkpoint has. Raises UserError where there are none."""
    source = weights.find(where)
    held = weights.model_tensors(where)[1] if source.layout == "checkpoint" else {}
    objective = recipe_of(where)["objective"] if held else {}
    unit = bool(objective.get("unit_prototypes", True))
    out = {}
    for name in ("dino_head", "ibot_head"):
        prefix = f"teacher.{name}."
        if f"{prefix}prototypes" not in held:
            raise UserError(
                f"{where}: has no {name}, only a backbone; write objective.loss=features, or name a run of dinov2 or dinov3"
            )
        (hidden, inputs), (count, bottleneck) = held[f"{prefix}mlp.0.weight"], held[f"{prefix}prototypes"]
        out[name] = (inputs, hidden, bottleneck, count, unit)
    return out


def recipe_of(where: str) -> dict[str, Any]:
    """The recipe that a checkpoint was written by, as plain values."""
    store, name = locate(where)
    return store.about(name)["recipe"]


def load_teacher(teacher: torch.nn.ModuleDict, where: str) -> None:
    """Fill {"backbone": …} from any source, and heads, if it has some, from the checkpoint that the source then is."""
    weights.load_into(teacher["backbone"], where)  # type: ignore[arg-type]
    heads = [name for name in teacher if name != "backbone"]
    if not heads or not weights.reading():
        return
    reader, _ = weights.model_tensors(where)
    state = {
        f"teacher.{name}.{k}": torch.empty_like(v) for name in heads for k, v in teacher[name].state_dict().items()
    }
    fill({"model": state}, reader, where, alone=True)
    teacher.load_state_dict({k.removeprefix("teacher."): v for k, v in state.items()}, strict=False)


def like(where: str) -> Backbone:
    """A backbone of the kind that lies somewhere, with random weights."""
    return presets.build(weights.find(where).cfg)


def cell_of(where: str) -> int:
    """Pixels per token along one side of the backbone that lies somewhere."""
    with torch.device("meta"):
        return like(where).patch_size


def builders(specs: list[str]) -> dict[str, Callable[[], Backbone]]:
    """{name: builder} of models given as "NAME" or "NAME option=value …"; of several with one name, the later ones are numbered."""
    out: dict[str, Callable[[], Backbone]] = {}
    for spec in specs:
        name, *options = spec.split()
        values = dict(config.parse_override(option) for option in options)
        cfg = weights.config_of(name, values, f"objective.students {spec!r}")
        count = sum(key.partition("-")[0] == name for key in out)
        out[f"{name}-{count + 1}" if count else name] = functools.partial(presets.build, cfg)
    return out
