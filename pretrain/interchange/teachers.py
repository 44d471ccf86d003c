"""The networks of a distillation: a frozen teacher, loaded from any source, and students that are given by their
names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from common import yaml_values
from common.errors import UserError
from pretrain.checkpoint.dcp_format import fill
from pretrain.checkpoint.tools import locate
from pretrain.interchange.load_record import is_loading
from pretrain.interchange.weight_sources import checkpoint_tensors, find_source, model_config
from pretrain.interchange.weights import load_into
from pretrain.models.build import build_model
from pretrain.models.layers import Backbone
from pretrain.ops.heads import Lengths


def head_arguments(where: str) -> dict[str, tuple[int, int, int, int, Lengths, bool]]:
    """{name of a head: arguments of `PrototypeHead`} for the heads of the teacher in a checkpoint. Raises UserError if
    it lacks one, or if `where` is not a checkpoint."""
    shapes = checkpoint_tensors(where)[1] if find_source(where).layout == "checkpoint" else {}
    objective = checkpoint_recipe(where)["objective"] if shapes else {}
    arguments: dict[str, tuple[int, int, int, int, Lengths, bool]] = {}
    for name in ("dino_head", "ibot_head"):
        prefix = f"teacher.{name}."
        if f"{prefix}prototypes" not in shapes:
            raise UserError(
                f"{where}: has no {name}, only a backbone; write objective.loss=features,"
                " or name a run of dinov2 or dinov3"
            )
        (hidden, inputs), (count, bottleneck) = shapes[f"{prefix}mlp.0.weight"], shapes[f"{prefix}prototypes"]
        lengths: Lengths = "unit" if objective.get("unit_prototypes", True) else "unnormalised"
        lengths = "weight_norm" if f"{prefix}lengths" in shapes else lengths
        batch_norms = f"{prefix}mlp.1.running_mean" in shapes
        arguments[name] = (inputs, hidden, bottleneck, count, lengths, batch_norms)
    return arguments


def checkpoint_recipe(where: str) -> dict[str, Any]:
    """The recipe of the run that wrote a checkpoint, as plain values."""
    store, name = locate(where)
    return store.run_json(name)["recipe"]


def load_teacher(teacher: torch.nn.ModuleDict, where: str) -> None:
    """Load the weights of the teacher's "backbone" from any source and, if the teacher has heads, those of the heads
    from the same source, which must be a checkpoint."""
    load_into(teacher["backbone"], where)  # type: ignore[arg-type]
    heads = [name for name in teacher if name != "backbone"]
    if not heads or not is_loading():
        return
    reader, _ = checkpoint_tensors(where)
    state = {
        f"teacher.{name}.{k}": torch.empty_like(v) for name in heads for k, v in teacher[name].state_dict().items()
    }
    fill({"model": state}, reader, where, alone=True)
    teacher.load_state_dict({k.removeprefix("teacher."): v for k, v in state.items()}, strict=False)


def build_like(where: str) -> Backbone:
    """A backbone with random weights and the config of the backbone in a source."""
    return build_model(find_source(where).cfg)


def check_reads(what: str, body: Backbone, model: Backbone) -> None:
    """Raises ValueError for a network whose input differs from that of the recipe's model."""
    found, channels = (getattr(network.cfg, "in_channels", None) for network in (body, model))
    if found != channels:
        reads = "text" if found is None else f"images of {found} channels"
        raise ValueError(f"{what}: reads {reads}, but model.in_channels = {channels}; name one that reads as many")


def patch_size_of(where: str) -> int:
    """The number of pixels per token along one side, for the backbone in a source."""
    with torch.device("meta"):
        return build_like(where).patch_size


def patch_sizes_of(specs: list[str]) -> list[int]:
    """The number of pixels per token along one side, for each student that `student_builders` builds."""
    with torch.device("meta"):
        return [build().patch_size for build in student_builders(specs).values()]


def student_builders(specs: list[str]) -> dict[str, Callable[[], Backbone]]:
    """{name: builder} of students that are given as "NAME" or "NAME option=value …". If several students have the same
    name, the second is called NAME-2, and so on."""
    builders: dict[str, Callable[[], Backbone]] = {}
    for spec in specs:
        name, *options = spec.split()
        values = dict(yaml_values.parse_override(option) for option in options)
        cfg = model_config(name, values, f"objective.students {spec!r}")
        count = sum(key.partition("-")[0] == name for key in builders)
        builders[f"{name}-{count + 1}" if count else name] = functools.partial(build_model, cfg)
    return builders
