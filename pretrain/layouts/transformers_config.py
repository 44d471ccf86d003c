"""Which model of ours a config.json of transformers describes. Absent fields have the defaults of transformers' classes."""

from __future__ import annotations

from typing import Any

from pretrain.errors import UserError
from pretrain.layouts import transformers_text_config
from pretrain.layouts.transformers_text import CLASSES


def describe(fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """(our model's name, its options) from config.json's fields; absent ones have transformers' defaults. Raises UserError for a class we have not."""
    kind = fields.get("model_type")
    if kind in CLASSES:
        return transformers_text_config.describe(kind, fields, where)
    if kind == "dinov3_convnext":
        return "convnext", {
            "widths": fields.get("hidden_sizes", [96, 192, 384, 768]),
            "depths": fields.get("depths", [3, 3, 9, 3]),
            "in_channels": fields.get("num_channels", 3),
            "norm_eps": fields.get("layer_norm_eps", 1e-6),
            "image_size": fields.get("image_size", 224),
        }
    if kind == "resnet":
        sizes, bottleneck = fields.get("hidden_sizes", [256, 512, 1024, 2048]), fields.get("layer_type") != "basic"
        return "resnet", {
            "widths": [s // 4 for s in sizes] if bottleneck else sizes,
            "depths": fields.get("depths", [3, 4, 6, 3]),
            "block": "bottleneck" if bottleneck else "basic",
            "in_channels": fields.get("num_channels", 3),
        }
    if kind not in ("dinov3_vit", "dinov2", "dinov2_with_registers", "vit", "vit_mae"):
        known = (
            f"dinov3_vit, dinov3_convnext, dinov2, dinov2_with_registers, vit, vit_mae, resnet, {', '.join(CLASSES)}"
        )
        raise UserError(f"{where}: model_type = {kind!r}: not known; known: {known}")
    return "vit", _describe_vit(kind, fields, where)


def _describe_vit(kind: str, fields: dict[str, Any], where: str) -> dict[str, Any]:
    rope, plain = kind == "dinov3_vit", kind in ("vit", "vit_mae")
    small = {"hidden_size": 384, "num_attention_heads": 6} if rope else {}
    f = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, **small, **fields}
    dim = f["hidden_size"]
    out = {
        "image_size": f.get("image_size", 224),
        "patch_size": f.get("patch_size", 14 if kind.startswith("dinov2") else 16),
        "in_channels": f.get("num_channels", 3),
        "dim": dim,
        "depth": f["num_hidden_layers"],
        "heads": f["num_attention_heads"],
        "registers": f.get("num_register_tokens", 4 if kind == "dinov2_with_registers" else 0),
        "norm_eps": f.get("layer_norm_eps", 1e-5 if rope else 1e-12 if plain else 1e-6),
        "positions": "rope" if rope else "learned",
        "qkv_bias": f.get("query_bias" if rope else "qkv_bias", True),
        "layer_scale": None if plain else f.get("layerscale_value", 1.0),
        "mask_token": not plain and f.get("use_mask_token", True),
    }
    gated = f.get("use_gated_mlp" if rope else "use_swiglu_ffn", False)
    if rope or plain:
        out["mlp_ratio"] = f.get("intermediate_size", 1536 if rope else 3072) / dim
    else:
        hidden = dim * f.get("mlp_ratio", 4)
        out["mlp_ratio"] = ((int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden) / dim
    out["mlp"] = "swiglu" if gated else "gelu"
    if rope:
        parameters = f.get("rope_parameters") or {}
        out["rope_base"] = float(parameters.get("rope_theta", f.get("rope_theta", 100.0)))
        out["key_bias"] = f.get("key_bias", False) if out["qkv_bias"] else True
        out |= {f"rope_{k}": f.get(f"pos_embed_{k}") for k in ("shift", "jitter", "rescale")}
        wanted = {
            "value_bias": out["qkv_bias"],
            "mlp_bias": True,
            "proj_bias": True,
            "hidden_act": "silu" if gated else "gelu",
        }
        for key, value in wanted.items():
            if f.get(key, value) != value:
                raise UserError(
                    f"{where}: {key} = {f[key]!r}: only {value!r} is known with the rest of this config.json"
                )
    return out
