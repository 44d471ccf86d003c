"""The layout of timm: write a folder that `timm.create_model("local-dir:FOLDER")` opens, and read such folders of
timm's ViTs (with learned or rotary positions) and ConvNeXts.

In config.json, `architecture` and `model_args` name the model. Folders from other sources may omit arguments. Therefore
the reader lets timm build the model on the meta device, and takes the options from its modules.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from pretrain.interchange.layouts.transformers import State, with_key_bias, without_key_bias
from pretrain.models import families
from pretrain.models.build import build_model


# ---------------------------------------------------------------- writing
def write(cfg: Any, state: State, mean: list[float], std: list[float]) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors with timm's names) for our model with the config `cfg` and the state dict
    `state`. Raises UserError for a model that timm does not have."""
    if isinstance(cfg, families.ConvNeXt):
        architecture = "convnext_tiny"
        arguments: dict[str, Any] = {"depths": cfg.depths, "dims": cfg.widths, "ls_init_value": cfg.layer_scale}
        tensors = {_convnext_key(key): value for key, value in state.items()}
        side = cfg.image_size
    elif isinstance(cfg, families.ViT):
        if cfg.pooling == "attention" or cfg.embed_norm or not cfg.patch_bias or cfg.mlp not in ("gelu", "swiglu"):
            raise UserError(
                f"model.pooling = {cfg.pooling}, model.embed_norm = {cfg.embed_norm}, model.mlp = {cfg.mlp}: cannot be"
                " written for timm; this layout has class tokens, no such norm, and the MLPs gelu and swiglu"
            )
        architecture, arguments = (_rotary_model if cfg.positions == "rope" else _plain_model)(cfg)
        tensors, side = _vit_tensors(cfg, state), cfg.image_size
    else:
        raise UserError(
            f"model.name = {cfg.name}: cannot be written for timm; this layout holds only ViTs and ConvNeXts"
        )
    pixels = {"input_size": [cfg.in_channels, side, side], "mean": mean, "std": std, "interpolation": "bicubic"}
    fields = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": cfg.widths[-1] if isinstance(cfg, families.ConvNeXt) else cfg.dim,
        "model_args": {"in_chans": cfg.in_channels, **arguments},
        "pretrained_cfg": {**pixels, "crop_pct": 1.0, "num_classes": 0, "fixed_input_size": False},
    }
    return fields, tensors


def _common_arguments(cfg: families.ViT) -> dict[str, Any]:
    sizes = {"img_size": cfg.image_size, "patch_size": cfg.patch_size, "embed_dim": cfg.dim, "depth": cfg.depth}
    return {**sizes, "num_heads": cfg.heads, "init_values": cfg.layer_scale, "global_pool": "token"}


def _rotary_model(cfg: families.ViT) -> tuple[str, dict[str, Any]]:
    """(architecture, model_args) of a ViT with rotary positions."""
    if cfg.qkv_bias and cfg.key_bias:
        raise UserError(
            "model.key_bias = true: timm's ViT with rotary positions has no bias for keys; train with"
            " model.key_bias=false, or export to another layout"
        )
    name = f"vit_small_{'plus_' if cfg.mlp == 'swiglu' else ''}patch16_dinov3{'_qkvb' if cfg.qkv_bias else ''}"
    # timm computes the hidden width as int(dim · mlp_ratio); 1e-9 prevents rounding down to the next smaller integer.
    more = {"mlp_ratio": cfg.mlp_ratio + 1e-9, "num_reg_tokens": cfg.registers, "rope_temperature": cfg.rope_base}
    return name, _common_arguments(cfg) | more | ({"swiglu_align_to": 1} if cfg.mlp == "swiglu" else {})


def _plain_model(cfg: families.ViT) -> tuple[str, dict[str, Any]]:
    """(architecture, model_args) of a ViT with learned positions."""
    gated = cfg.mlp == "swiglu"
    name = "vit_giant_patch14_reg4_dinov2" if gated else "vit_small_patch16_224"
    more = {
        "mlp_ratio": cfg.mlp_ratio * (2 if gated else 1) + 1e-9,  # timm counts the gate's width as well
        "reg_tokens": cfg.registers,
        "qkv_bias": cfg.qkv_bias,
    }
    return name, _common_arguments(cfg) | more | {"no_embed_class": cfg.registers > 0, "dynamic_img_size": True}


def _vit_tensors(cfg: families.ViT, state: State) -> State:
    """The tensors of our ViT with timm's names, without those that only training uses."""
    rope, out = cfg.positions == "rope", {}
    for key, value in state.items():
        if key == "mask_token" or key.startswith("local_cls_norm."):
            continue
        if key.endswith("qkv.bias") and rope:
            out[key.replace("qkv.bias", "q_bias")], out[key.replace("qkv.bias", "v_bias")] = value.chunk(2)
            continue
        if key.endswith("qkv.bias") and not cfg.key_bias:
            value = with_key_bias(value)
        if not rope and ".mlp.w1." in key:
            out[key.replace("w1", "fc1")] = torch.cat([value, state[key.replace("w1", "w2")]])
        elif rope or ".mlp.w2." not in key:
            out[_vit_key(key, rope)] = value
    if not rope and cfg.registers:  # timm's position table has no entry for the class token in this case
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


_ROTARY_NAMES = {  # part of our name → part of timm's name
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}


def _vit_key(key: str, rope: bool) -> str:
    """timm's name for a tensor of our ViT."""
    key = re.sub(r"^patch_embed\.", "patch_embed.proj.", key)
    key = "reg_token" if key == "registers" else key
    for ours, theirs in (_ROTARY_NAMES if rope else {"mlp.w3": "mlp.fc2"}).items():
        key = key.replace(ours, theirs)
    return key


def _convnext_key(key: str) -> str:
    """timm's name for a tensor of our ConvNeXt."""
    key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
    key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
    for ours, theirs in (("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2")):
        key = key.replace(ours, theirs)
    return re.sub(r"^norm\.", "head.norm.", key)


# ---------------------------------------------------------------- reading
def describe(fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """(name of our model, its options) for the folder `where` of timm, whose config.json holds `fields`. Raises
    UserError for an architecture that we do not have."""
    try:
        import timm
    except ImportError:
        raise UserError(f"{where}: holds a model of timm, which is not installed; run `pip install timm`") from None
    arguments = fields.get("model_args", {})
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(f"local-dir:{where}", pretrained=False, num_classes=0)
    except Exception as error:  # timm may raise any exception for invalid arguments
        raise UserError(f"{where}: timm cannot build its model ({' '.join(str(error).split())[:200]})") from None
    kind = type(model).__name__
    if kind == "ConvNeXt":
        widths = [info["num_chs"] for info in model.feature_info]
        scaled, activation = model.stages[0].blocks[0].gamma is not None, model.stages[0].blocks[0].mlp.act
        if type(activation).__name__ != "GELU":  # torch's or timm's
            raise UserError(f"{where}: its activation is {type(activation).__name__}; only GELU can be read")
        return "convnext", {
            "widths": widths,
            "depths": [len(stage.blocks) for stage in model.stages],
            "in_channels": model.stem[0].in_channels,
            "layer_scale": 1e-6 if scaled else None,
            "norm_eps": model.head.norm.eps,
        }
    rope = kind == "Eva" and getattr(model, "rope", None) is not None and model.pos_embed is None
    if not rope and kind != "VisionTransformer":
        raise UserError(
            f"{where}: architecture = {fields['architecture']!r} is timm's {kind};"
            " only its ViTs and ConvNeXts can be read"
        )
    for what, found in (("class token", model.cls_token is not None), ("last norm", hasattr(model.norm, "eps"))):
        if not found:
            raise UserError(
                f"{where}: has no {what} (its global_pool is {model.global_pool!r}); only timm's ViTs with a class token"
                " and a last norm of all tokens can be read"
            )
    block, size = model.blocks[0], model.patch_embed.img_size
    gated = hasattr(block.mlp, "fc1_g") or block.mlp.fc1.out_features == 2 * block.mlp.fc2.in_features
    if not isinstance(block.mlp.act, torch.nn.SiLU if gated else torch.nn.GELU):
        raise UserError(
            f"{where}: its activation is {type(block.mlp.act).__name__}; only GELU, and SiLU in a gated MLP,"
            " can be read"
        )
    bias = block.attn.q_bias is not None if rope else block.attn.qkv.bias is not None
    return "vit", {
        "image_size": size[0] if size else 224,
        "patch_size": model.patch_embed.patch_size[0],
        "in_channels": model.patch_embed.proj.in_channels,
        "dim": model.embed_dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "mlp": "swiglu" if gated else "gelu",
        "mlp_ratio": block.mlp.fc2.in_features / model.embed_dim,
        "registers": getattr(model, "num_reg_tokens", model.num_prefix_tokens - 1),
        "layer_scale": 1e-5 if hasattr(block, "gamma_1" if rope else "ls1") and _has_layer_scale(block, rope) else None,
        "qkv_bias": bias,
        "key_bias": not (rope and bias),
        "norm_eps": model.norm.eps,
        "positions": "rope" if rope else "learned",
        **({"rope_base": float(arguments.get("rope_temperature", 100.0))} if rope else {}),
    }


def _has_layer_scale(block: Any, rope: bool) -> bool:
    return block.gamma_1 is not None if rope else hasattr(block.ls1, "gamma")


def read(cfg: Any, tensors: State) -> State:
    """Convert tensors with timm's names to our state dict, without a classifier. Tensors with unknown names keep these
    names."""
    own = build_model(cfg).state_dict()
    if isinstance(cfg, families.ConvNeXt):
        known = {_convnext_key(key): key for key in own}  # timm's name → our name
        tensors = {known.get(k, k): v for k, v in tensors.items() if not k.startswith("head.fc")}
        # Small ConvNeXts of timm have 1 × 1 convolutions instead of linear layers.
        return {k: v.flatten(1) if "pwconv" in k and v.shape[2:] == (1, 1) else v for k, v in tensors.items()}
    rope = cfg.positions == "rope"
    known = {_vit_key(key, rope): key for key in own}
    out: State = {}
    for key, value in tensors.items():
        if key in ("head.weight", "head.bias") or key.endswith("k_bias"):
            continue
        if key.endswith(".q_bias"):
            out[key.replace("q_bias", "qkv.bias")] = torch.cat([value, tensors[key.replace("q_bias", "v_bias")]])
        elif not rope and cfg.mlp == "swiglu" and ".mlp.fc1." in key:
            for name, half in zip(("w1", "w2"), value.chunk(2), strict=True):
                out[key.replace("fc1", name)] = half
        elif not key.endswith(".v_bias"):
            out[known.get(key, key)] = _our_value(cfg, key, value, tensors)
    return out


def _our_value(cfg: families.ViT, key: str, value: Tensor, tensors: State) -> Tensor:
    """Convert a tensor of timm's ViT to that of ours: the position table gets an entry for the class token, and biases
    of keys are removed if our config has none."""
    side = cfg.image_size // cfg.patch_size
    if key == "pos_embed" and value.shape[1] == side * side:  # without an entry for the class token
        return torch.cat([torch.zeros_like(tensors["cls_token"]), value], dim=1)
    if key.endswith("qkv.bias") and not cfg.key_bias:
        return without_key_bias(value, key)
    return value
