"""Reads the config.json of a model's folder. The file may come from anybody, so the types of its fields are checked
before a layout uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.untrusted import loads, read_text, schema_error, short_repr

# Whole numbers of 1 or more.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_channels"),
    *("max_position_embeddings", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "d_model", "d_kv", "d_ff"),
    *("num_layers", "num_heads", "type_vocab_size", "max_window_layers", "relative_attention_num_buckets"),
    *("relative_attention_max_distance", "feature_projection_input_dim", "conv_depthwise_kernel_size"),
    *("tubelet_size", "num_frames", "frames_per_clip", "crop_size", "in_chans"),
)
# Whole numbers of 1 or more, or null.
NULLABLE_SIZES = ("num_key_value_heads", "head_dim", "n_inner", "num_decoder_layers", "sliding_window")
# Any numbers, or null.
NUMBERS = (
    *("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "layerscale_value", "rope_theta", "mlp_ratio"),
    "num_register_tokens",
)
NORMALISATION = {"?mean": [float], "?std": [float]}
ROPE_NUMBERS = ("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor")
ROPE = (
    {
        **{f"?{name}": float for name in ROPE_NUMBERS},
        **{"?rope_type": str, "?type": str, "?original_max_position_embeddings": int},
    },
    None,
)
OUR_FIELDS = {
    "model": {"name": str},
    **NORMALISATION,
    "?audio": {"sample_rate": int, "seconds": float, "mels": int, **NORMALISATION},
    "?text": {"kind": str, "model": {"name": str}, "projection_dim": int, "length": int},
    **{"?pool": str, "?step": (int, None), "?objective": (str, None), "?student": str},
    "?fps": float,
}
SCHEMA: dict[str, Any] = {  # see `schema_error`; further fields are allowed
    "?unlabeled": OUR_FIELDS,
    **{"?architecture": str, "?model_type": str, "?model_args": dict, "?pretrained_cfg": NORMALISATION},
    **{"?depths": [int], "?hidden_sizes": [int], "?layer_types": ([str], None)},
    **{"?rope_parameters": ROPE, "?rope_scaling": ROPE},
    **{"?eos_token_id": (int, [int], None), "?bos_token_id": (int, None), "?decoder_start_token_id": (int, None)},
    **{f"?{name}": int for name in (*SIZES, "left_max_position_embeddings", "right_max_position_embeddings")},
    **{"?hidden_act": str, "?position_embeddings_type": (str, None), "?add_adapter": bool},
    **{f"?{name}": (int, None) for name in NULLABLE_SIZES},
    **{f"?{name}": (float, None) for name in NUMBERS},
}


def read(folder: Path) -> dict[str, Any]:
    """The fields of FOLDER/config.json; a size that is null, such as `vocab_size` of w2v-BERT 2.0, is left out. Raises
    FileNotFoundError if there is no such file, and UserError if it is not valid."""
    path = folder / "config.json"
    fields: dict[str, Any] = {}
    try:
        fields = loads(read_text(path))
        if isinstance(fields, dict):
            fields = {key: value for key, value in fields.items() if value is not None or key not in SIZES}
        problem = schema_error(fields, SCHEMA) or _too_small(fields)
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = str(error.strerror or error)
    except ValueError as error:
        problem = str(error)
    if problem:
        kind = (
            f"; model_type = {short_repr(fields['model_type'])}"
            if isinstance(fields, dict) and "model_type" in fields
            else ""
        )
        raise UserError(
            f"{path}: is no description of a model that can be read ({problem}{kind}); export or download the model"
            " again, or take another one"
        )
    return fields


def require(fields: dict[str, Any], where: str, **required: Any) -> None:
    """Raises UserError unless each required field is absent, or has the given value (or one of a tuple of values)."""
    for key, value in required.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if fields.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{where}: {key} = {fields[key]!r} cannot be read; only {' or '.join(map(repr, allowed))} can"
            )


def _too_small(fields: dict[str, Any]) -> str:
    """Part of an error message about the first size that is not 1 or more; "" if there is none."""
    for name in (*SIZES, *NULLABLE_SIZES):
        if fields.get(name) is not None and fields[name] < 1:
            return f"{name} is {short_repr(fields[name])}, not 1 or more"
    return ""
