"""Convert the config.json of a text model of transformers to the name and the options of our model. Absent fields have
the defaults of transformers' classes."""

from __future__ import annotations

from typing import Any

from common.errors import UserError
from pretrain.interchange.layouts.fields import require

Options = tuple[str, dict[str, Any]]  # our model's name and its options


def describe(kind: str, fields: dict[str, Any], where: str) -> Options:
    """(our model's name, its options) from the fields of config.json. `kind`: its model_type. Raises UserError if the
    fields describe something that our models do not have."""
    return {"gpt2": _gpt2, "bert": _bert, "t5": _t5}.get(kind, _llama)(kind, fields, where)


def _llama(kind: str, fields: dict[str, Any], where: str) -> Options:
    all_defaults: dict[str, dict[str, Any]] = {
        "llama": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
        },
        "arcee": {
            "vocab_size": 32000,
            "hidden_size": 2560,
            "intermediate_size": 18432,
            "max_position_embeddings": 4096,
        },
        "apertus": {
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 65536,
            "rope_theta": 12e6,
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "head_dim": 128},
    }
    defaults = all_defaults[kind]
    f = {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768, **defaults, **fields}
    bias = f.get("attention_bias", False)
    relu2, qk_norm = kind in ("arcee", "apertus"), kind in ("qwen3", "apertus")
    require({"hidden_act": "xielu", **f} if kind == "apertus" else f, where, hidden_act="relu2" if relu2 else "silu")
    if qk_norm:
        require(f, where, attention_bias=False)
    else:
        require(f, where, mlp_bias=bias)
    rope = f.get("rope_parameters") or f.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "llama3" and "factor" not in rope:
        raise UserError(f"{where}: rope_parameters.factor is missing")
    if rope_type not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: rope_parameters = {rope} cannot be read; only rope_type default and llama3 can")
    heads = f["num_attention_heads"]
    options = {
        "vocab_size": f["vocab_size"],
        "context": f["max_position_embeddings"],
        "dim": f["hidden_size"],
        "depth": f["num_hidden_layers"],
        "heads": heads,
        "head_dim": f.get("head_dim") or f["hidden_size"] // heads,
        "kv_heads": f.get("num_key_value_heads")
        or (32 if kind == "qwen3" and "num_key_value_heads" not in f else heads),
        "mlp": "relu2" if relu2 else "swiglu",
        "mlp_width": f["intermediate_size"],
        "norm_eps": f.get("rms_norm_eps", 1e-5 if relu2 else 1e-6),
        "rope_base": float(rope.get("rope_theta", f.get("rope_theta", 10000.0))),
        "qk_norm": qk_norm,
        "tied": f.get("tie_word_embeddings", False),
        "bias": bias,
    }
    if rope_type == "llama3":
        options |= {
            "rope_factor": float(rope["factor"]),
            "rope_low": float(rope.get("low_freq_factor", 1.0)),
            "rope_high": float(rope.get("high_freq_factor", 4.0)),
            "rope_context": rope.get("original_max_position_embeddings", f["max_position_embeddings"]),
        }
    if kind == "qwen3" and f.get("use_sliding_window") and f.get("sliding_window", 4096) is not None:
        depth, first = f["num_hidden_layers"], f.get("max_window_layers", 28)
        types = f.get("layer_types") or ["sliding" if i >= first else "full" for i in range(depth)]
        options["windows"] = [f.get("sliding_window", 4096) if name.startswith("sliding") else 0 for name in types]
    return "gpt", options


def _gpt2(kind: str, fields: dict[str, Any], where: str) -> Options:
    f = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, **fields}
    odd = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}
    require(f, where, activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu"), **odd)
    return "gpt2_124m", {
        "vocab_size": f["vocab_size"],
        "context": f["n_positions"],
        "dim": f["n_embd"],
        "depth": f["n_layer"],
        "heads": f["n_head"],
        "mlp": "gelu" if f.get("activation_function") == "gelu" else "gelu_tanh",
        "mlp_width": f.get("n_inner") or 4 * f["n_embd"],
        "norm_eps": f.get("layer_norm_epsilon", 1e-5),
        "tied": f.get("tie_word_embeddings", True),
    }


def _bert(kind: str, fields: dict[str, Any], where: str) -> Options:
    f = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, **fields}
    odd = {"is_decoder": False, "tie_word_embeddings": True}
    require(f, where, hidden_act="gelu", position_embedding_type=("absolute", None), **odd)
    return "bert_base", {
        "vocab_size": f["vocab_size"],
        "context": f.get("max_position_embeddings", 512),
        "dim": f["hidden_size"],
        "depth": f["num_hidden_layers"],
        "heads": f["num_attention_heads"],
        "mlp_width": f.get("intermediate_size", 3072),
        "norm_eps": f.get("layer_norm_eps", 1e-12),
        "segments": f.get("type_vocab_size", 2),
    }


def _t5(kind: str, fields: dict[str, Any], where: str) -> Options:
    f = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, **fields}
    require(f, where, feed_forward_proj=("relu", "gated-gelu"))
    scaled = f.get("scale_decoder_outputs", f.get("tie_word_embeddings", True) is not False)
    return "t5_small", {
        "vocab_size": f["vocab_size"],
        "context": f.get("n_positions", 512),
        "dim": f["d_model"],
        "depth": f["num_layers"],
        "decoder_depth": f.get("num_decoder_layers"),
        "heads": f["num_heads"],
        "head_dim": f["d_kv"],
        "mlp_width": f["d_ff"],
        "mlp": "geglu" if f.get("feed_forward_proj", "relu") == "gated-gelu" else "relu",
        "norm_eps": f.get("layer_norm_epsilon", 1e-6),
        "buckets": f.get("relative_attention_num_buckets", 32),
        "max_distance": f.get("relative_attention_max_distance", 128),
        "tied": scaled,
    }
