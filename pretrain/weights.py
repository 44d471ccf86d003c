"""Weights from anywhere: an export or a checkpoint of ours, a `transformers` or `timm` folder, an official DINOv2 or DINOv3 file, as one of our backbones.

`load_backbone(SOURCE)` builds the model that the source describes; `load_into(backbone, SOURCE)` fills one that a recipe has built, after a comparison of
all that changes the numbers; `load_run(objective, SOURCE)` fills a whole objective from a checkpoint. Nothing that is read is executed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pretrain import config
from pretrain.checkpoint_format import Reader, fill, read_metadata
from pretrain.checkpoint_tools import locate, names_one
from pretrain.errors import UserError
from pretrain.layouts import official, timm, transformers, transformers_config
from pretrain.layouts.transformers import State, with_key_bias, without_key_bias
from pretrain.models import presets
from pretrain.models.layers import Backbone
from pretrain.models.positions import resize_table
from pretrain.objectives.base import Objective

_reading = True
SHOWN = 20  # keys in an error
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, where a source does not say


@dataclass
class Source:
    """A backbone that lies somewhere: `cfg` describes it; `about` has at least mean, std, pool, step."""

    where: str
    cfg: Any
    layout: str  # unlabeled, checkpoint, transformers, timm or official
    kind: str = ""  # model_type of transformers
    tensors: State | None = None  # where they had to be read to know the model
    about: dict[str, Any] = field(default_factory=dict)

    def state(self) -> State:
        """The tensors under our names, those with names that we do not know under theirs."""
        if self.layout == "checkpoint":
            return _encoder_of(self.where)
        tensors = _tensors(Path(self.where)) if self.tensors is None else self.tensors
        if self.layout == "official":
            return official.read(self.cfg, tensors)
        if self.layout == "timm":
            return timm.read(self.cfg, tensors)
        return transformers.read(self.cfg, tensors, self.kind)


def reading() -> bool:
    """Whether weights are read: not inside of `unread`."""
    return _reading


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Inside, `load_into` leaves a backbone as it is: for what is overwritten from a checkpoint, or never computed with."""
    global _reading
    before, _reading = _reading, False
    try:
        yield
    finally:
        _reading = before


# ---------------------------------------------------------------- what lies there
def find(source: str | Path) -> Source:
    """What a folder or file holds. Raises UserError with what to write instead."""
    path = Path(source)
    if path.is_file():
        return _file(path)
    if "://" in str(source) or names_one(path):
        return _checkpoint(str(source))
    try:
        fields = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: is no exported model (config.json is missing); a run keeps its exports in RUN/export/STEP"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); export it again with `unlabeled export RUN`") from None
    if "unlabeled" in fields:
        about = fields["unlabeled"]
        model = dict(about["model"])
        return Source(str(path), config_of(model.pop("name"), model, str(path)), "unlabeled", about=about)
    if "architecture" in fields:
        name, options = timm.describe(fields, str(path))
        shown = fields.get("pretrained_cfg", {})
        look = {"mean": list(shown.get("mean", MEAN)), "std": list(shown.get("std", STD))}
        return Source(str(path), config_of(name, options, str(path)), "timm", about=_about(look))
    if "model_type" in fields:
        name, options = transformers_config.describe(fields, str(path))
        kind = fields["model_type"]
        return Source(
            str(path), config_of(name, options, str(path)), "transformers", kind, about=_about(_processor(path))
        )
    raise UserError(
        f"{path}: config.json has neither model_type (transformers), architecture (timm) nor the key unlabeled"
    )


def _checkpoint(where: str) -> Source:
    store, name = locate(where)
    recipe = store.about(name)["recipe"]
    model = dict(recipe["model"])
    about = {"mean": recipe["data"]["mean"], "std": recipe["data"]["std"], "step": int(name)}
    cfg = config_of(model.pop("name"), model, where)
    return Source(where, cfg, "checkpoint", about=_about(about) | {"objective": recipe["objective"]["name"]})


def _file(path: Path) -> Source:
    tensors = official.unwrap(_read(path), str(path))
    if not official.matches(tensors):
        names = ", ".join(list(tensors)[:5])
        raise UserError(
            f"{path}: has not the names of a DINOv2 or DINOv3 file ({names} …); name a transformers or timm folder"
        )
    name, options = official.describe(tensors, str(path))
    return Source(str(path), config_of(name, options, str(path)), "official", tensors=tensors, about=_about({}))


def config_of(name: str, options: dict[str, Any], where: str) -> Any:
    cls, defaults = presets.choose(name, f"{where}: ")
    cfg = config.build(cls, options, {"": where}, "model.", defaults)
    cfg.name = name
    return cfg


def _about(look: dict[str, Any]) -> dict[str, Any]:
    return {"mean": MEAN, "std": STD, "pool": "cls", "step": None, "objective": None, **look}


def _processor(path: Path) -> dict[str, Any]:
    """Mean and std out of preprocessor_config.json, where there is one."""
    try:
        found = json.loads((path / "preprocessor_config.json").read_text())
    except (OSError, ValueError):
        return {}
    return {k: list(found[f"image_{k}"]) for k in ("mean", "std") if found.get(f"image_{k}")}


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # safetensors and pickle have many
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read ({text})") from None


def _tensors(folder: Path) -> State:
    """All tensors of a folder: model.safetensors, or its shards by their index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder}: is no exported model (model.safetensors is missing)")
        return _read(folder / "model.safetensors")
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {key: value for part in parts for key, value in _read(folder / part).items()}


# ---------------------------------------------------------------- checkpoints
def model_tensors(where: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """(what reads a checkpoint, {name: shape} of the model's tensors)."""
    store, name = locate(where)
    files = store.about(name)["files"]
    metadata = read_metadata(store, name, files)
    held = {
        key.removeprefix("model."): tuple(value.size)
        for key, value in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(value, TensorStorageMetadata)
    }
    return Reader(store, name, files, metadata), held


def _encoder_of(where: str) -> State:
    """The encoder in a checkpoint: the teacher's backbone where there is one."""
    reader, held = model_tensors(where)
    prefix = next((p for p in ("teacher.backbone.", "backbone.") if any(k.startswith(p) for k in held)), None)
    if prefix is None:
        raise UserError(f"{where}: holds no backbone under a name that is known; export it with `unlabeled export RUN`")
    state = {k: torch.empty(shape) for k, shape in held.items() if k.startswith(prefix)}
    fill({"model": state}, reader, where, alone=True)
    return {k.removeprefix(prefix): v for k, v in state.items()}


def load_run(objective: Objective, where: str) -> set[str]:
    """Fill an objective with a checkpoint's weights; the names that were filled. Each process reads all of them.

    A position table of another size is resized to the model's, as a stage at higher resolution needs it.
    Raises UserError that names every tensor that is missing, unexpected or of another shape, but those that `objective.fresh` allows.
    """
    reader, held = model_tensors(where)
    own = objective.state_dict()
    alike = {k: v for k, v in own.items() if held.get(k) == tuple(v.shape) or (k in held and _is_table(k, v, held[k]))}
    wrong = [f"missing {k}" for k in own if k not in held and not k.startswith(objective.fresh)]
    wrong += [f"unexpected {k}" for k in held if k not in own and not k.startswith(objective.fresh)]
    wrong += [f"{k} is {list(held[k])}, here {list(v.shape)}" for k, v in own.items() if k in held and k not in alike]
    if wrong:
        raise UserError(f"{where}: is a checkpoint of another model: {_listed(wrong)}")
    state = {k: v.new_empty(held[k]) for k, v in alike.items()}
    fill({"model": state}, reader, where, alone=True)
    for key, value in state.items():
        if value.shape != own[key].shape:
            body = cast(Any, objective.get_submodule(key.rpartition(".")[0]))
            state[key] = resize_table(value, math.isqrt(own[key].shape[1] - 1), antialias=body.cfg.registers > 0)
    objective.load_state_dict(state, strict=False)
    return set(state)


def _is_table(name: str, own: Tensor, theirs: tuple[int, ...]) -> bool:
    """Whether both are position tables [1, 1 + side², D] of one width."""
    return name.endswith("pos_embed") and len(theirs) == 3 and theirs[2] == own.shape[2]


def _listed(wrong: list[str]) -> str:
    return ", ".join(wrong[:SHOWN]) + (f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")


# ---------------------------------------------------------------- into a backbone
def load_backbone(source: str | Path, **changes: Any) -> tuple[Backbone, dict[str, Any]]:
    """(the backbone that a source describes, in eval mode and with its weights; what is known of it: mean, std, pool, step, …)."""
    found = find(source)
    backbone = presets.build(found.cfg, **changes)
    _fill(backbone, found, "its config")
    return backbone.eval(), found.about


def load_into(backbone: Backbone, source: str | Path) -> None:
    """Fill a backbone. Raises UserError that names every option that differs and every key that is missing, unexpected or of another shape.

    Exactly the same features come out at the source's own size, or there is an error. Allowed to differ: a mask token that only one side has (a new
    one is zero), a norm for local crops (begins as the common one), layer scales of one, biases of keys that are zero, the size of a position table.
    """
    if _reading:
        _fill(backbone, find(source), f"model.name = {backbone.cfg.name}")


SAME = ("heads", "patch_size", "positions", "rope_base", "mlp", "norm_eps", "block", "stem", "architecture", "kv_heads")
SAME += ("norm", "qk_norm", "windows", "softcap", "tied", "buckets", "max_distance")


def _options(cfg: Any) -> dict[str, Any]:
    """A config's values with those settled that follow from others."""
    if not isinstance(cfg, presets.Decoder):
        return vars(cfg)
    _, heads, kv_heads, _, _ = presets.decoder_sizes(cfg)
    windows = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.depth)] if any(cfg.windows) else []
    return vars(cfg) | {"heads": heads, "kv_heads": kv_heads, "windows": windows}


def _fill(backbone: Backbone, found: Source, what: str) -> None:
    ours, theirs = _options(backbone.cfg), _options(found.cfg)
    if type(backbone.cfg) is not type(found.cfg):
        kinds = type(found.cfg).__name__, type(backbone.cfg).__name__
        raise UserError(f"{found.where}: holds a {kinds[0]}, but model.name = {backbone.cfg.name} is a {kinds[1]}")
    rope = ours.get("positions") == "rope"
    unlike = [k for k in SAME if k in ours and ours[k] != theirs[k] and (k != "rope_base" or rope)]
    unlike = [k for k in unlike if k != "positions" or {ours[k], theirs[k]} != {"learned", "sincos"}]
    if unlike:
        said = ", ".join(f"model.{k} = {ours[k]!r}, there {theirs[k]!r}" for k in unlike)
        raise UserError(f"{found.where}: is another model: {said}; set these to what is there")
    own = backbone.state_dict()
    state = _adapted(backbone.cfg, found.cfg, found.state(), own)
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {list(state[k].shape)}, here {list(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        raise UserError(f"{found.where}: its weights do not fit {what}: {_listed(wrong)}")
    backbone.load_state_dict(state)


def _adapted(ours: Any, theirs: Any, state: State, own: State) -> State:
    """The state with what is allowed to differ made alike."""
    state = dict(state)
    if (
        isinstance(ours, (presets.ViT, presets.ConvNeXt))
        and ours.layer_scale is not None
        and theirs.layer_scale is None
    ):
        state |= {k: torch.ones_like(v) for k, v in own.items() if k.endswith(".gamma")}
    if not isinstance(ours, presets.ViT):
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
        state["pos_embed"] = resize_table(state["pos_embed"], side, antialias=ours.registers > 0)
    return {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
