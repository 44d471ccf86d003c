"""The layout of transformers for dual encoders: fields of config.json and names of tensors of CLIPModel and SiglipModel,
whose four transformers have the same names.

A dual encoder with options that these classes do not have keeps our names, and its `model_type` is `unlabeled_clip` or
`unlabeled_siglip`; `unsupported` says which options these are.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.untrusted import schema_error
from pretrain.interchange.layouts.fields import NUMBERS, SIZES
from pretrain.models import families

State = dict[str, Tensor]
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # {model_type: class of transformers}
VISION_TYPES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}  # of the image models alone
MODEL_TYPES = (*CLASSES, *VISION_TYPES)
KINDS = (*MODEL_TYPES, *(f"unlabeled_{kind}" for kind in CLASSES))
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
IMAGE = "image."  # prefix of the image model's tensors in our own layout
_SCHEMA = {f"?{name}": int for name in SIZES} | {f"?{name}": (float, None) for name in NUMBERS} | {"?hidden_act": str}


def unsupported(kind: str, image: Any, text: Any) -> list[str]:
    """The overrides of a recipe with which the class of transformers for `kind` would compute the model; [] if it
    does. A network that is no ViT is answered with model=…"""
    if not isinstance(image, families.ViT):
        return [f"model={kind}_vitb16"]
    clip = kind == "clip"
    wanted: dict[str, Any] = {
        "embed_norm": clip,
        "patch_bias": not clip,
        **{"registers": 0, "layer_scale": None, "qkv_bias": True, "key_bias": True},
    }
    out = [f"model.{key}={json.dumps(value)}" for key, value in wanted.items() if vars(image)[key] != value]
    pooling = "token" if clip else "attention"
    out += [f"model.pooling={pooling}"] * (image.pooling != pooling)
    out += ["model.positions=learned"] * (image.positions == "rope")
    out += [f"model.mlp={'quick_gelu' if clip else 'gelu_tanh'}"] * (image.mlp not in ACTIVATIONS)
    if not isinstance(text, families.Decoder):
        return [*out, f"objective.text={kind}_text"]
    dim, heads, kv_heads, head_dim, _ = families.decoder_sizes(text)
    text_wanted: dict[str, Any] = {"bias": True, "qk_norm": False, "windows": []}
    text_wanted |= {"softcap": None, "tied": True, "bidirectional": not clip}
    out += [f"objective.text.{k}={json.dumps(v)}" for k, v in text_wanted.items() if vars(text)[k] != v]
    out += ["objective.text.positions=learned"] * (text.positions != "learned")
    out += ["objective.text.norm=layer"] * (text.norm != "layer")
    out += ["objective.text.mlp=gelu"] * (text.mlp not in ACTIVATIONS)
    return (
        out
        + ["objective.text.kv_heads=null"] * (kv_heads != heads)
        + ["objective.text.head_dim=auto"] * (heads * head_dim != dim)
    )


# ---------------------------------------------------------------- writing
def write(
    kind: str, image: Any, image_state: State, text: Any, text_state: State, ids: dict[str, int]
) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors) of an image model and a `TextSide` (its state dict is `text_state`). `ids`: of
    special tokens, as {"eos_token_id": …}."""
    eos = ids.get("eos_token_id")
    # if EOS is 2, CLIPModel takes the text's feature from the place of the largest token
    if unsupported(kind, image, text) or eos is None or (kind == "clip" and eos == 2):
        own: dict[str, Any] = {"model_type": f"unlabeled_{kind}", "architectures": ["TextSide"]}
        return own, {f"{IMAGE}{k}": v for k, v in image_state.items()} | text_state
    dim, heads, _, _, width = families.decoder_sizes(text)
    projection = len(text_state["text_projection.weight"])
    vision_fields: dict[str, Any] = {
        "hidden_size": image.dim,
        "intermediate_size": int(image.dim * image.mlp_ratio + 1e-6),
        "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads,
        "num_channels": image.in_channels,
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "hidden_act": ACTIVATIONS[image.mlp],
        "layer_norm_eps": image.norm_eps,
    }
    text_fields: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": dim,
        "intermediate_size": width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": heads,
        "max_position_embeddings": text.context,
        "hidden_act": ACTIVATIONS[text.mlp],
        "layer_norm_eps": text.norm_eps,
        **ids,
    }
    fields: dict[str, Any] = {"model_type": kind, "architectures": [CLASSES[kind]]}
    if kind == "clip":
        fields |= {"projection_dim": projection}
        text_fields["projection_dim"] = vision_fields["projection_dim"] = projection
    else:
        text_fields["projection_size"] = projection
    fields |= {"text_config": text_fields, "vision_config": vision_fields}
    tensors = _to_theirs(image_state, _image_names(image.depth, kind)) | _to_theirs(
        text_state, _text_names(text.depth, kind)
    )
    if kind == "clip":
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    return fields, tensors


# ---------------------------------------------------------------- reading
def read_image(cfg: Any, tensors: State, kind: str) -> State:
    """Our image model's state dict, of the tensors that `write` has written, or of a file for one of MODEL_TYPES."""
    if kind.startswith("unlabeled_"):
        return {k.removeprefix(IMAGE): v for k, v in tensors.items() if k.startswith(IMAGE)}
    if kind in VISION_TYPES and not any(key.startswith("vision_model.") for key in tensors):  # as version 5 writes them
        tensors = {f"vision_model.{key}": tensor for key, tensor in tensors.items()}
    kind = VISION_TYPES.get(kind, kind)
    return _to_ours(tensors, _image_names(cfg.depth, kind))


def read_text(depth: int, tensors: State, kind: str) -> State:
    """The state dict of a `TextSide` whose text model has `depth` blocks."""
    if kind.startswith("unlabeled_"):
        return {k: v for k, v in tensors.items() if not k.startswith(IMAGE)}
    return _to_ours(tensors, _text_names(depth, kind))


def describe_image(kind: str, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The options of our ViT for the image model of one of MODEL_TYPES."""
    f = fields if kind in VISION_TYPES else fields.get("vision_config") or {}
    _check(f, f"{where}: vision_config")
    clip = VISION_TYPES.get(kind, kind) == "clip"
    dim = f.get("hidden_size", 768)
    return {
        "image_size": f.get("image_size", 224),
        "patch_size": f.get("patch_size", 32 if clip else 16),
        "in_channels": f.get("num_channels", 3),
        "dim": dim,
        "depth": f.get("num_hidden_layers", 12),
        "heads": f.get("num_attention_heads", 12),
        "mlp_ratio": f.get("intermediate_size", 3072) / dim,
        "mlp": activation(f, "quick_gelu" if clip else "gelu_pytorch_tanh", where),
        "norm_eps": f.get("layer_norm_eps", 1e-5 if clip else 1e-6),
        "embed_norm": clip,
        "patch_bias": not clip,
        "pooling": "token" if clip else "attention",
    }


def describe_text(kind: str, fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any], int]:
    """(name of our text model, its options, width of the embeddings) of a folder of CLIPModel or SiglipModel."""
    f = fields.get("text_config") or {}
    _check(f, f"{where}: text_config")
    clip = kind == "clip"
    dim = f.get("hidden_size", 512 if clip else 768)
    options = {
        "vocab_size": f.get("vocab_size", 49408 if clip else 32000),
        "context": f.get("max_position_embeddings", 77 if clip else 64),
        "dim": dim,
        "depth": f.get("num_hidden_layers", 12),
        "heads": f.get("num_attention_heads", 8 if clip else 12),
        "mlp_width": f.get("intermediate_size", 2048 if clip else 3072),
        "mlp": activation(f, "quick_gelu" if clip else "gelu_pytorch_tanh", where),
        "norm_eps": f.get("layer_norm_eps", 1e-5 if clip else 1e-6),
    }
    width = fields.get("projection_dim", 512) if clip else f.get("projection_size", dim)
    return f"{kind}_text", options, width


def _check(fields: Any, where: str) -> None:
    problem = "it is no object" if not isinstance(fields, dict) else schema_error(fields, _SCHEMA)
    too_small = [] if problem else [k for k in SIZES if fields.get(k) is not None and fields[k] < 1]
    if problem or too_small:
        raise UserError(f"{where}: {problem or f'{too_small[0]} is below 1'}; download the model again")


def activation(fields: dict[str, Any], default: str, where: str) -> str:
    """Our name of the activation `hidden_act`. Raises UserError for one that our MLPs do not have."""
    ours = {theirs: kind for kind, theirs in ACTIVATIONS.items()}
    found = fields.get("hidden_act", default)
    if found not in ours:
        raise UserError(f"{where}: hidden_act = {found!r} cannot be read; only {', '.join(ours)} can")
    return ours[found]


# ---------------------------------------------------------------- names
# (our tensors, transformers' tensors): one of ours is split into several of theirs, or several into one
Names = list[tuple[list[str], list[str]]]
_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}


def _blocks(depth: int, layer: str, prefix: str, mlp: tuple[str, str]) -> Names:
    names: Names = []
    for i in range(depth):
        ours, theirs = f"{prefix}blocks.{i}", f"{layer}.{i}"
        names += [([f"{ours}.{a}"], [f"{theirs}.{b}"]) for a, b in _BLOCK.items()]
        names += [([f"{ours}.mlp.{a}"], [f"{theirs}.mlp.{b}"]) for a, b in zip(mlp, ("fc1", "fc2"), strict=True)]
        names.append(([f"{ours}.attn.qkv"], [f"{theirs}.self_attn.{n}_proj" for n in "qkv"]))
    return names


def _image_names(depth: int, kind: str) -> Names:
    one = {
        "patch_embed": "embeddings.patch_embedding",
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "embed_norm": "pre_layrnorm",
        "norm": "post_layernorm",
    }
    if kind == "siglip":
        one |= {"attention_pool.query_token": "head.probe", "attention_pool.proj": "head.attention.out_proj"}
        one |= {"attention_pool.norm": "head.layernorm"}
        one |= {f"attention_pool.mlp.{n}": f"head.mlp.{n}" for n in ("fc1", "fc2")}
    names: Names = [([ours], [f"vision_model.{theirs}"]) for ours, theirs in one.items()]
    pool = [f"attention_pool.{part}" for part in ("query", "key_value")]
    names += [
        ([f"{part}.{suffix}" for part in pool], [f"vision_model.head.attention.in_proj_{suffix}"])
        for suffix in ("weight", "bias")
    ]
    return names + _blocks(depth, "vision_model.encoder.layers", "", ("fc1", "fc2"))


def _text_names(depth: int, kind: str) -> Names:
    one = {
        "text.embed": "text_model.embeddings.token_embedding",
        "text.position_embed": "text_model.embeddings.position_embedding",
        "text.norm": "text_model.final_layer_norm",
        "text_projection": "text_projection" if kind == "clip" else "text_model.head",
        "image_projection": "visual_projection",
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
    }
    names: Names = [([ours], [theirs]) for ours, theirs in one.items()]
    return names + _blocks(depth, "text_model.encoder.layers", "text.", ("up", "down"))


def _to_theirs(state: State, names: Names) -> State:
    out: State = {}
    for ours, theirs in names:
        for suffix in ("", ".weight", ".bias"):
            parts = [state[name + suffix] for name in ours if name + suffix in state]
            if len(parts) == len(ours):
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                for name, part in zip(theirs, whole.chunk(len(theirs)), strict=True):
                    out[name + suffix] = _their_shape(name, part).clone().contiguous()
    return out


def _to_ours(tensors: State, names: Names) -> State:
    out: State = {}
    for ours, theirs in names:
        for suffix in ("", ".weight", ".bias"):
            parts = [tensors[name + suffix] for name in theirs if name + suffix in tensors]
            if len(parts) < len(theirs):
                continue
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            if len(ours) == 1:
                out[ours[0] + suffix] = _our_shape(ours[0], whole)
            else:  # query [D], key and value [2·D] of the attention pool
                third = len(whole) // 3
                out |= zip(ours, (whole[:third].clone(), whole[third:].clone()), strict=True)
    return out


def _their_shape(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("class_embedding"):
        return tensor.flatten()
    if name == "vision_model.embeddings.position_embedding.weight":
        return tensor.squeeze(0)
    return tensor


def _our_shape(name: str, tensor: Tensor) -> Tensor:
    if name == "cls_token":
        return tensor.view(1, 1, -1)
    if name == "pos_embed":
        return tensor.unsqueeze(0)
    return tensor.reshape(1) if name.startswith("logit_") else tensor.contiguous()
