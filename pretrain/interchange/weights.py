"""Loads weights into our backbones from any source: an export or a checkpoint of ours, a `transformers` or `timm`
folder, or an official DINOv2 or DINOv3 file.

`load_backbone(SOURCE)` builds the model that the source describes. `load_into(backbone, SOURCE)` loads the weights into
a backbone that a recipe has built, and first compares all options that change the features. `load_run(objective,
SOURCE)` loads the weights of a whole objective (heads, teacher) from a checkpoint. No code of a source is executed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from common import config
from common.errors import UserError
from pretrain.checkpoint.dcp_format import fill
from pretrain.checkpoint.tools import locate
from pretrain.interchange import text_sides
from pretrain.interchange.compatible_options import describe_differences, incompatible_options
from pretrain.interchange.layouts.transformers import State, with_key_bias, without_key_bias
from pretrain.interchange.load_record import is_loading, record, skip_loading
from pretrain.interchange.weight_sources import Source, checkpoint_source, checkpoint_tensors, find_source
from pretrain.models import families
from pretrain.models.build import build_model
from pretrain.models.layers import Backbone
from pretrain.models.positions import resize_table
from pretrain.objectives.base import Objective

MAX_NAMED_TENSORS = 20  # in an error message


# ---------------------------------------------------------------- a backbone
def load_backbone(source: str | Path, **changes: Any) -> tuple[Backbone, dict[str, Any]]:
    """(the backbone that a source describes, in eval mode and with its weights; `Source.about`: mean, std, pool, step,
    …).

    `changes`: options of the model that replace those of the source, for example position_offset=0.1 for an official
    DINOv2 file of a model without registers.
    """
    found = find_source(source)
    backbone = build_model(found.cfg, **changes)
    _load(backbone, found, "its config")
    return backbone.eval(), found.about


def tensors_of(source: str | Path) -> State:
    """The weights of the backbone that a source describes, as `load_backbone` would load them. The backbone itself is
    only built on the meta device."""
    found = find_source(source)
    with torch.device("meta"), skip_loading():
        own = build_model(found.cfg).state_dict()
    return _fitting_tensors(own, found.cfg, found, "its config")


def load_into(backbone: Backbone, source: str | Path) -> None:
    """Load a source's weights into a backbone, which then computes exactly the same features at the source's image
    size. Does nothing inside `skip_loading`.

    Raises UserError if the two do not fit; it names the options that differ, or the tensors that are missing,
    unexpected or of another shape. Only these differences are allowed: a mask token that only one side has (the
    backbone keeps its own), a separate norm for local crops (a missing one is copied from the common norm), layer
    scales (missing ones are set to 1), zero biases of attention keys, and the size of a position table (it is resized).
    """
    if is_loading():
        _load(backbone, find_source(source), f"model.name = {backbone.cfg.name}")


def load_text_into(backbone: Backbone, source: str | Path, key: str) -> None:
    """The same for the text model of an objective that has two models; `key` is its section in the recipe. Of a source
    that holds an image model and a text model, the latter is loaded."""
    if is_loading():
        _load(backbone, text_sides.find_text_source(source), f"{key}.name = {backbone.cfg.name}", key)


def _load(backbone: Backbone, source: Source, origin: str, key: str = "model") -> None:
    """Load a source's weights into a backbone, see `load_into`. For error messages: `origin`, the name of the config
    from which the backbone was built, and `key`, its section in a recipe."""
    state = _fitting_tensors(backbone.state_dict(), backbone.cfg, source, origin, key)
    backbone.load_state_dict(state)
    backbone.loaded = True
    record(source, f"the backbone {source.cfg.name}", state)


def _fitting_tensors(own: State, cfg: Any, source: Source, origin: str, key: str = "model") -> State:
    """A source's weights for a backbone with the state dict `own` and the config `cfg`. Raises UserError if they do not
    fit, see `load_into`."""
    if config.config_class(cfg) is not config.config_class(source.cfg):
        theirs, ours = type(source.cfg).__name__, type(cfg).__name__
        raise UserError(
            f"{source.where}: holds a {theirs}, but {key}.name = {cfg.name} is a {ours}; write"
            f" {key}={source.cfg.name} (a further message names the options that it needs)"
        )
    if differing := incompatible_options(cfg, source.cfg, key):
        raise UserError(f"{source.where}: is another model: {describe_differences(differing)}")
    state = _adapt(source.state_dict(), cfg, source.cfg, own)
    problems = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} is {list(state[k].shape)}, here {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        raise UserError(f"{source.where}: its weights do not fit {origin}: {_first_of(problems)}")
    return state


def _adapt(state: State, ours: Any, theirs: Any, own: State) -> State:
    """A source's state dict, changed to fit the backbone where `load_into` allows them to differ. `ours` and `theirs`
    are the configs of backbone and source, `own` is the backbone's state dict."""
    state = dict(state)
    if (
        isinstance(ours, (families.ViT, families.ConvNeXt))
        and ours.layer_scale is not None
        and theirs.layer_scale is None
    ):
        state |= {k: torch.ones_like(v) for k, v in own.items() if k.endswith(".gamma")}
    if not isinstance(ours, families.ViT):
        return state
    if not ours.mask_token:
        state.pop("mask_token", None)
    elif "mask_token" in own:
        state.setdefault("mask_token", own["mask_token"])
    if ours.local_cls_norm:
        state |= {k: state.get(k, state[k.removeprefix("local_cls_")]) for k in own if k.startswith("local_cls_norm.")}
    else:
        state = {k: v for k, v in state.items() if not k.startswith("local_cls_norm.")}
    if ours.qkv_bias and theirs.qkv_bias and ours.key_bias != theirs.key_bias:
        change = with_key_bias if ours.key_bias else lambda bias: without_key_bias(bias, "attn.qkv.bias")
        state |= {k: change(v) for k, v in state.items() if k.endswith("qkv.bias")}
    if "pos_embed" in state and "pos_embed" in own and state["pos_embed"].shape != own["pos_embed"].shape:
        side = ours.image_size // ours.patch_size
        state["pos_embed"] = resize_table(state["pos_embed"], side, ours.registers > 0, ours.position_offset)
    return {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}


# ---------------------------------------------------------------- a whole objective
def load_run(objective: Objective, where: str) -> set[str]:
    """Load a checkpoint's weights into an objective, on every rank. Returns the names of the tensors that were loaded.

    A position table of another size is resized to the objective's, for a training stage at higher resolution.
    Raises UserError that names every tensor that is missing, unexpected or of another shape. Tensors whose names begin
    with one of `objective.reinitialized` may be missing or unexpected.
    """
    reader, stored = checkpoint_tensors(where)
    own = objective.state_dict()
    fitting = {k: v for k, v in own.items() if k in stored and _fits(k, v, stored[k])}
    problems = [f"missing {k}" for k in own if k not in stored and not k.startswith(objective.reinitialized)]
    problems += [f"unexpected {k}" for k in stored if k not in own and not k.startswith(objective.reinitialized)]
    problems += [
        f"{k} is {list(stored[k])}, here {list(v.shape)}" for k, v in own.items() if k in stored and k not in fitting
    ]
    if problems:
        raise UserError(f"{where}: {_why_no_fit(objective, where, stored)}{_first_of(problems)}")
    state = {k: v.new_empty(stored[k]) for k, v in fitting.items()}
    fill({"model": state}, reader, where, alone=True)
    not_loaded = sorted({key.partition(".")[0] for key in own if key not in state})
    record(checkpoint_source(where), "everything" + (f" but {', '.join(not_loaded)}" if not_loaded else ""), state)
    for key, value in state.items():
        if value.shape != own[key].shape:
            cfg = cast(Any, objective.get_submodule(key.rpartition(".")[0])).cfg
            side = math.isqrt(own[key].shape[1])  # with or without an entry of the class token
            state[key] = resize_table(value, side, cfg.registers > 0, cfg.position_offset)
    objective.load_state_dict(state, strict=False)
    return set(state)


def _fits(name: str, own: Tensor, stored: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape can be loaded: the shapes are equal, or both are those of position tables
    [1, 1 + side², D] with the same D."""
    is_table = name.endswith("pos_embed") and len(stored) == 3 and stored[2] == own.shape[2]
    return stored == tuple(own.shape) or is_table


def _why_no_fit(objective: Objective, where: str, stored: dict[str, tuple[int, ...]]) -> str:
    """The beginning of an error message: why a checkpoint does not fit an objective (the method or the options that
    differ), and what to write instead. `stored`: {name: shape} of the checkpoint's tensors."""
    store, name = locate(where)
    theirs, ours = store.run_json(name)["recipe"]["objective"], config.to_dict(objective.cfg)
    if theirs["name"] != ours.get("name"):
        return (
            f"is a run of {theirs['name']}, and this one is of {ours.get('name')}; to load its backbone alone, write"
            f" init.backbone={where} in place of init.run. "
        )
    differing = incompatible_options(objective.encoder().cfg, checkpoint_source(where).cfg)
    own = {k: tuple(v.shape) for k, v in objective.state_dict().items()}
    # Also name the integer options of the objective whose values are, on both sides, dimensions of tensors that do not
    # fit.
    sizes_here = {n for k, shape in own.items() if stored.get(k) != shape for n in shape}
    sizes_there = {n for k, shape in stored.items() if own.get(k) != shape for n in shape}
    for k, v in theirs.items():
        if type(v) is int and v in sizes_there and ours.get(k) in sizes_here and ours[k] != v:
            differing[f"objective.{k}"] = (ours[k], v)
    return "is a checkpoint of another model: " + (f"{describe_differences(differing)}; " if differing else "")


def _first_of(problems: list[str]) -> str:
    """The first MAX_NAMED_TENSORS problems, and the number of the others."""
    more = len(problems) - MAX_NAMED_TENSORS
    return ", ".join(problems[:MAX_NAMED_TENSORS]) + (f", and {more} more" if more > 0 else "")
