"""The layout of transformers for models of clips: fields of config.json, names of tensors (those of transformers 4,
which version 5 reads, too), and the file of the video processor.

A model with positions `sequence` and without key biases becomes a `videomae`, and one with positions `rope` a `vjepa2`.
transformers has no class for the others, which keep our names (`unlabeled_video_vit`). The predictor that `VJEPA2Model`
has beside the encoder is no part of an export: it is written with no blocks and weights of zero, so that the folder is
complete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.models import families

State = dict[str, Tensor]
OWN = "unlabeled_video_vit"
PREDICTOR_WIDTH = 2  # of the empty predictor of a `vjepa2`
_OTHER_PARTS = (  # prefixes of tensors outside of the encoder
    *("decoder.", "encoder_to_decoder.", "mask_token", "classifier.", "fc_norm."),  # of the classes of VideoMAE
    *("predictor.", "pooler."),  # of those of V-JEPA 2
)


def kind_of(cfg: families.VideoViT) -> str:
    """The model_type for a model of clips."""
    if cfg.positions == "rope":
        return "vjepa2"
    return "videomae" if cfg.positions == "sequence" and not (cfg.qkv_bias and cfg.key_bias) else OWN


def write(cfg: families.VideoViT, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors) of our state dict."""
    kind = kind_of(cfg)
    if kind == OWN:
        return {"model_type": OWN, "architectures": ["VideoTransformer"]}, state
    fields = {
        "model_type": kind,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "patch_size": cfg.patch_size,
        "tubelet_size": cfg.tubelet,
        "hidden_act": "gelu",
        "layer_norm_eps": cfg.norm_eps,
        "qkv_bias": cfg.qkv_bias,
    }
    if kind == "videomae":
        fields |= {"architectures": ["VideoMAEModel"], "image_size": cfg.image_size, "num_frames": cfg.frames}
        fields |= {"num_channels": cfg.in_channels, "intermediate_size": int(cfg.dim * cfg.mlp_ratio + 1e-6)}
        fields |= {"use_mean_pooling": False}  # true: without the last norm
    else:
        fields |= {"architectures": ["VJEPA2Model"], "crop_size": cfg.image_size, "frames_per_clip": cfg.frames}
        fields |= {"in_chans": cfg.in_channels, "mlp_ratio": int(cfg.dim * cfg.mlp_ratio + 1e-6) / cfg.dim}
        fields |= {"pred_hidden_size": PREDICTOR_WIDTH, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 0}
        fields |= {"pred_num_mask_tokens": 1}
    out = _empty_predictor(cfg) if kind == "vjepa2" else {}
    for ours, theirs in _names(cfg, kind):
        if ours not in state:
            continue
        if ours == "patch_embed.weight":
            cubes = (cfg.dim, cfg.tubelet, cfg.patch_size, cfg.patch_size, cfg.in_channels)
            out[theirs[0]] = state[ours].reshape(cubes).permute(0, 4, 1, 2, 3).contiguous()
        elif len(theirs) == 1:
            out[theirs[0]] = state[ours]
        else:
            parts = _biases(cfg, state[ours]) if ours.endswith("qkv.bias") else state[ours].chunk(3)
            out |= {name: part.clone() for name, part in zip(theirs, parts, strict=True) if name}
    return fields, out


def read(cfg: families.VideoViT, tensors: State, kind: str = "") -> State:
    """Our state dict of the tensors that `write` has written, or of a file for transformers' class with the model_type
    `kind`. Tensors with unknown names keep these names."""
    kind = kind or kind_of(cfg)
    if kind == OWN:
        return tensors
    named = {k.removeprefix(f"{kind}."): v for k, v in tensors.items()}
    named = {_name_of_4(k): v for k, v in named.items() if not k.startswith(_OTHER_PARTS)}
    out: State = {}
    for ours, theirs in _names(cfg, kind):
        parts = [named.pop(name) for name in theirs if name in named]
        if not parts:
            continue
        if ours == "patch_embed.weight" and parts[0].ndim == 5:
            parts = [parts[0].permute(0, 2, 3, 4, 1).flatten(1)]
        if ours.endswith("qkv.bias") and len(parts) == 3 and not cfg.key_bias and not parts[1].any():
            parts = [parts[0], parts[2]]
        out[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out | named


def _name_of_4(key: str) -> str:
    """The name that transformers 4 has for a tensor of `videomae` with a name of version 5."""
    for name in ("query", "value"):
        key = key.replace(f"attention.attention.{name}.bias", f"attention.attention.{name[0]}_bias")
    return key


def _biases(cfg: families.VideoViT, bias: Tensor) -> tuple[Tensor, ...]:
    """The biases of query, key and value."""
    if cfg.key_bias:
        return bias.chunk(3)
    query, value = bias.chunk(2)
    return query, torch.zeros_like(query), value


def _names(cfg: families.VideoViT, kind: str) -> list[tuple[str, tuple[str, ...]]]:
    """[(our name, transformers' names)] of the tensors; several names for one of ours that holds query, key and value,
    and "" for a part that is not stored."""
    linear = ("weight", "bias")
    if kind == "videomae":
        stem, last, block = "embeddings.patch_embeddings.projection", "layernorm", "encoder.layer.{}"
        layers = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
        layers |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        weights = tuple(f"attention.attention.{name}.weight" for name in ("query", "key", "value"))
        biases = ("attention.attention.q_bias", "", "attention.attention.v_bias")
    else:
        stem, last, block = "encoder.embeddings.patch_embeddings.proj", "encoder.layernorm", "encoder.layer.{}"
        layers = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")} | {"attn.proj": "attention.proj"}
        weights, biases = (tuple(f"attention.{n}.{end}" for n in ("query", "key", "value")) for end in linear)
    names: list[tuple[str, tuple[str, ...]]] = [(f"patch_embed.{end}", (f"{stem}.{end}",)) for end in linear]
    for i in range(cfg.depth):
        prefix = block.format(i)
        names += [(f"blocks.{i}.{a}.{end}", (f"{prefix}.{b}.{end}",)) for a, b in layers.items() for end in linear]
        for end, parts in zip(linear, (weights, biases), strict=True):
            names.append((f"blocks.{i}.attn.qkv.{end}", tuple(part and f"{prefix}.{part}" for part in parts)))
    names += [(f"norm.{end}", (f"{last}.{end}",)) for end in linear]
    return names


def _empty_predictor(cfg: families.VideoViT) -> State:
    width = PREDICTOR_WIDTH
    shapes = {
        "embeddings.mask_tokens": (1, 1, 1, width),
        "embeddings.predictor_embeddings.weight": (width, cfg.dim),
        "embeddings.predictor_embeddings.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "proj.weight": (cfg.dim, width),
        "proj.bias": (cfg.dim,),
    }
    return {f"predictor.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def describe(kind: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name of our model, its options) for the fields of a config.json with the model_type `kind`."""
    if kind == "videomae":
        f = {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            **fields,
        }
        ratio, positions, eps = f["intermediate_size"] / f["hidden_size"], "sequence", 1e-12
        size, frames, channels = f.get("image_size", 224), f.get("num_frames", 16), f.get("num_channels", 3)
    else:
        f = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, **fields}
        ratio, positions, eps = f.get("mlp_ratio", 4.0), "rope", 1e-6
        size, frames, channels = f.get("crop_size", 256), f.get("frames_per_clip", 64), f.get("in_chans", 3)
    return "video_vit", {
        "image_size": size,
        "frames": frames,
        "in_channels": channels,
        "patch_size": f.get("patch_size", 16),
        "tubelet": f.get("tubelet_size", 2),
        "dim": f["hidden_size"],
        "depth": f["num_hidden_layers"],
        "heads": f["num_attention_heads"],
        "mlp_ratio": ratio,
        "positions": positions,
        "qkv_bias": f.get("qkv_bias", f.get("qv_bias", True)),
        "key_bias": kind == "vjepa2",
        "norm_eps": f.get("layer_norm_eps", eps),
    }
