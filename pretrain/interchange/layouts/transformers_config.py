"""Convert a config.json of transformers to the name and the options of our model. Fields that are absent have the
defaults of transformers' config classes. `transformers_text_config.py` does the same for text models."""

from __future__ import annotations

from typing import Any

from common.errors import UserError
from pretrain.interchange.layouts import (
    transformers_audio,
    transformers_image_text,
    transformers_text_config,
    transformers_video,
)
from pretrain.interchange.layouts.fields import require
from pretrain.interchange.layouts.transformers_image_text import activation
from pretrain.interchange.layouts.transformers_text import CLASSES


def describe(fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """(name of our model, its options) for the fields of a config.json. Raises UserError for a model that we do not
    have.
    """
    kind = fields.get("model_type")
    if kind in CLASSES:
        return transformers_text_config.describe(kind, fields, where)
    if kind in transformers_image_text.MODEL_TYPES:
        return "vit", transformers_image_text.describe_image(kind, fields, where)
    if kind in ("videomae", "vjepa2"):
        require(fields, where, hidden_act="gelu")
        return transformers_video.describe(kind, fields)
    if kind == "dinov3_convnext":
        require(fields, where, hidden_act="gelu")
        return "convnext", {
            "widths": fields.get("hidden_sizes", [96, 192, 384, 768]),
            "depths": fields.get("depths", [3, 3, 9, 3]),
            "in_channels": fields.get("num_channels", 3),
            "norm_eps": fields.get("layer_norm_eps", 1e-6),
            "image_size": fields.get("image_size", 224),
        }
    if kind == "resnet":
        strides = {"downsample_in_first_stage": False, "downsample_in_bottleneck": False}
        require(fields, where, hidden_act="relu", **strides)
        sizes, bottleneck = fields.get("hidden_sizes", [256, 512, 1024, 2048]), fields.get("layer_type") != "basic"
        return "resnet", {
            "widths": [s // 4 for s in sizes] if bottleneck else sizes,
            "depths": fields.get("depths", [3, 4, 6, 3]),
            "block": "bottleneck" if bottleneck else "basic",
            "in_channels": fields.get("num_channels", 3),
        }
    if kind == transformers_audio.KIND:
        return transformers_audio.describe(fields, where)
    if kind not in ("dinov3_vit", "dinov2", "dinov2_with_registers", "vit", "vit_mae"):
        known = (
            f"dinov3_vit, dinov3_convnext, dinov2, dinov2_with_registers, vit, vit_mae, videomae, vjepa2, resnet,"
            f" {transformers_audio.KIND}, {', '.join((*transformers_image_text.MODEL_TYPES, *CLASSES))}"
        )
        raise UserError(f"{where}: model_type = {kind!r} cannot be read; the types that can be read are {known}")
    return "vit", _describe_vit(kind, fields, where)


def _describe_vit(kind: str, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The options of our ViT for a ViT of transformers with the model_type `kind`."""
    rope, plain = kind == "dinov3_vit", kind in ("vit", "vit_mae")
    dinov3_defaults = {"hidden_size": 384, "num_attention_heads": 6} if rope else {}
    f = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, **dinov3_defaults, **fields}
    dim = f["hidden_size"]
    options = {
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
        options["mlp_ratio"] = f.get("intermediate_size", 1536 if rope else 3072) / dim
    else:
        hidden = dim * f.get("mlp_ratio", 4)
        options["mlp_ratio"] = ((int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden) / dim
    options["mlp"] = "swiglu" if gated else activation(f, "gelu", where)
    if rope:
        parameters = f.get("rope_parameters") or {}
        options["rope_base"] = float(parameters.get("rope_theta", f.get("rope_theta", 100.0)))
        options["key_bias"] = f.get("key_bias", False) if options["qkv_bias"] else True
        options |= {f"rope_{k}": f.get(f"pos_embed_{k}") for k in ("shift", "jitter", "rescale")}
        required = {"value_bias": options["qkv_bias"], "mlp_bias": True, "proj_bias": True}
        required |= {"hidden_act": "silu"} if gated else {}
        for key, value in required.items():
            if f.get(key, value) != value:
                raise UserError(
                    f"{where}: {key} = {f[key]!r} cannot be read; our ViT has only {key} = {value!r} in combination"
                    " with the other values of this config.json"
                )
    return options
