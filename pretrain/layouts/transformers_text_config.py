"""Which text model of ours a config.json of transformers describes. Absent fields have the defaults of transformers' classes."""

from __future__ import annotations

from typing import Any

from pretrain.errors import UserError

Options = tuple[str, dict[str, Any]]  # our model's name and its options


def describe(kind: str, fields: dict[str, Any], where: str) -> Options:
    """Raises UserError where the fields ask for what our models have not."""
    return {"gpt2": _gpt2, "bert": _bert, "t5": _t5}.get(kind, _llama)(kind, fields, where)


def _only(fields: dict[str, Any], where: str, **wanted: Any) -> None:
    """Each field must be absent, or what is wanted (or among it, where it is a tuple)."""
    for key, value in wanted.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if fields.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} = {fields[key]!r}: only {' or '.join(map(repr, allowed))} is known here")


def _llama(kind: str, fields: dict[str, Any], where: str) -> Options:
    defaults = {
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
        "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "head_dim": 128},
    }[kind]
    f = {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768, **defaults, **fields}
    bias = f.get("attention_bias", False)
    _only(f, where, hidden_act="relu2" if kind == "arcee" else "silu")
    if kind == "qwen3":
        _only(f, where, attention_bias=False)
    else:
        _only(f, where, mlp_bias=bias)
    rope = f.get("rope_parameters") or f.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: rope is scaled ({rope}), which our decoder does not do")
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
        "mlp": "relu2" if kind == "arcee" else "swiglu",
        "mlp_width": f["intermediate_size"],
        "norm_eps": f.get("rms_norm_eps", 1e-5 if kind == "arcee" else 1e-6),
        "rope_base": float(rope.get("rope_theta", f.get("rope_theta", 10000.0))),
        "qk_norm": kind == "qwen3",
        "tied": f.get("tie_word_embeddings", False),
        "bias": bias,
    }
    if kind == "qwen3" and f.get("use_sliding_window") and f.get("sliding_window", 4096) is not None:
        depth, first = f["num_hidden_layers"], f.get("max_window_layers", 28)
        types = f.get("layer_types") or ["sliding" if i >= first else "full" for i in range(depth)]
        options["windows"] = [f.get("sliding_window", 4096) if name.startswith("sliding") else 0 for name in types]
    return "gpt", options


def _gpt2(kind: str, fields: dict[str, Any], where: str) -> Options:
    f = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, **fields}
    odd = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}
    _only(f, where, activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu"), **odd)
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
    _only(f, where, hidden_act="gelu", position_embedding_type=("absolute", None), **odd)
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
    _only(f, where, feed_forward_proj=("relu", "gated-gelu"))
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
