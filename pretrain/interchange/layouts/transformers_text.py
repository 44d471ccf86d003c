"""transformers' layout of text models: fields of config.json and names of tensors, for LlamaForCausalLM,
ArceeForCausalLM (LLaMA with relu2), Qwen3ForCausalLM, ApertusForCausalLM (Qwen3 with relu2), GPT2LMHeadModel,
BertForMaskedLM and T5ForConditionalGeneration.

A decoder with options that none of these classes has keeps our names, and its `model_type` is `unlabeled_decoder`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.models import families

State = dict[str, Tensor]
CLASSES = {  # {model_type: class of transformers}
    "llama": "LlamaForCausalLM",
    "arcee": "ArceeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "apertus": "ApertusForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}
OWN = "unlabeled_decoder"  # model_type of a decoder that no class of transformers can compute
# Tensors that are not read: parts of other classes around the same model, buffers, and copies of tied tensors.
_IGNORED = re.compile(
    r"(^|\.)(bert\.pooler\..*|cls\.seq_relationship\..*|embeddings\.position_ids|attn\.(masked_)?bias"
    r"|rotary_emb\.inv_freq|(encoder|decoder)\.embed_tokens\.weight|cls\.predictions\.decoder\.(weight|bias))$"
)


def is_text(cfg: Any) -> bool:
    return isinstance(cfg, (families.Decoder, families.TextEncoder, families.EncoderDecoder))


def kind_of(cfg: Any) -> tuple[str, str]:
    """(model_type of the class that computes the same as a text model of ours, ""), or (`OWN`, the option that no class
    has, as "model.KEY = VALUE")."""
    if isinstance(cfg, families.TextEncoder):
        return "bert", ""
    if isinstance(cfg, families.EncoderDecoder):
        return "t5", ""
    dim, heads, kv_heads, head_dim, _ = families.decoder_sizes(cfg)
    windows = {w for w in cfg.windows if w}
    if cfg.softcap is not None:
        return OWN, f"model.softcap = {cfg.softcap}"
    if cfg.bidirectional:
        return OWN, "model.bidirectional = true"
    if cfg.positions == "learned":
        unsupported = {  # {option: whether its value is one that the class does not have}
            "norm": cfg.norm != "layer",
            "mlp": "gelu" not in cfg.mlp,
            "bias": not cfg.bias,
            "qk_norm": cfg.qk_norm,
            "windows": bool(windows),
            "kv_heads": kv_heads != heads,
            "head_dim": heads * head_dim != dim,
        }
        kind = "gpt2"
    else:
        relu2 = cfg.mlp == "relu2"
        kind = ("apertus" if relu2 else "qwen3") if cfg.qk_norm else "arcee" if relu2 else "llama"
        unsupported = {
            "norm": cfg.norm != "rms",
            "mlp": cfg.mlp not in ("swiglu", "relu2"),
            "bias": cfg.bias and cfg.qk_norm,
            "windows": bool(windows) and (kind != "qwen3" or len(windows) > 1),
            "heads": kind == "llama" and dim % heads > 0,
        }
    first = next((key for key, is_unsupported in unsupported.items() if is_unsupported), None)
    return (OWN, f"model.{first} = {vars(cfg)[first]}") if first else (kind, "")


def write(cfg: Any, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors under transformers' names) of our state dict."""
    kind, _ = kind_of(cfg)
    if kind == OWN:
        return {"model_type": OWN, "architectures": ["DecoderTransformer"], "vocab_size": cfg.vocab_size}, dict(state)
    out: State = {}
    for name in _names(cfg, kind):
        for suffix in ("", ".weight", ".bias"):
            if (tensor := state.get(name.ours + suffix)) is None:
                continue
            pieces = tensor.split(name.rows) if name.rows else [tensor]
            for theirs, piece in zip(name.theirs, pieces, strict=True):
                out[theirs + suffix] = _transposed(piece, name).clone().contiguous()
    return {"model_type": kind, "architectures": [CLASSES[kind]], **_FIELDS[kind](cfg)}, out


def read(cfg: Any, tensors: State, kind: str = "") -> State:
    """Convert to our state dict the tensors that `write` has written, or those of a file for the class with the
    model_type `kind`. Tensors with unknown names keep these names."""
    kind = kind or kind_of(cfg)[0]
    if kind == OWN:
        return dict(tensors)
    if kind == "gpt2":  # released files do not have the prefix
        known = ("transformer.", "lm_head.")
        tensors = {k if k.startswith(known) else f"transformer.{k}": v for k, v in tensors.items()}
    if kind == "bert":  # the first releases have other names for norms
        tensors = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", k): v for k, v in tensors.items()}
        tensors = {re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", k): v for k, v in tensors.items()}
    out: State = {}
    used: set[str] = set()
    for name in _names(cfg, kind):
        for suffix in ("", ".weight", ".bias"):
            pieces = [_transposed(tensors[t + suffix], name) for t in name.theirs if t + suffix in tensors]
            if len(pieces) != len(name.theirs):
                continue
            used |= {theirs + suffix for theirs in name.theirs}
            out[name.ours + suffix] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
    if vars(cfg).get("tied", True):
        out.pop("head.weight", None)
    elif kind == "t5" and "embed.weight" in out:  # transformers ties it if the file has none
        out.setdefault("head.weight", out["embed.weight"])
    return out | {k: v for k, v in tensors.items() if k not in used and not _IGNORED.search(k)}


# ---------------------------------------------------------------- names
@dataclass
class Name:
    """The names of a tensor in our model and in transformers, without the suffixes .weight and .bias."""

    ours: str
    theirs: list[str]  # several if our tensor is fused
    rows: tuple[int, ...] = ()  # number of rows of each of transformers' tensors, if ours is fused
    transposed: bool = False  # GPT-2's Conv1D stores [in, out]


def _transposed(tensor: Tensor, name: Name) -> Tensor:
    return tensor.t() if name.transposed and tensor.ndim == 2 else tensor


@dataclass
class Layout:
    """The names of tensors in a class of transformers. `layer` is the prefix of those in a block, in which {i} stands
    for the number of the block."""

    layer: str
    top: dict[str, str]  # {our name: transformers' name} outside of blocks
    block: dict[str, str]  # {our name: transformers' name} in a block
    fused: dict[str, tuple[list[str], tuple[int, ...]]]  # {our name: (transformers' names, rows of each)} in a block


def _names(cfg: Any, kind: str) -> list[Name]:
    if kind == "t5":
        return _t5_names(cfg)
    if kind == "bert":
        layout = _bert_layout(cfg)
    else:
        layout = _gpt2_layout() if kind == "gpt2" else _llama_layout(cfg, kind)
    names = [Name(ours, [theirs]) for ours, theirs in layout.top.items()]
    for i in range(cfg.depth):
        ours, theirs = f"blocks.{i}", layout.layer.replace("{i}", str(i))
        names += [Name(f"{ours}.{a}", [f"{theirs}.{b}"], (), kind == "gpt2") for a, b in layout.block.items()]
        names += [Name(f"{ours}.{a}", [f"{theirs}.{b}" for b in parts], n) for a, (parts, n) in layout.fused.items()]
    return names


def _bert_layout(cfg: families.TextEncoder) -> Layout:
    top = {
        "embed": "bert.embeddings.word_embeddings",
        "position_embed": "bert.embeddings.position_embeddings",
        "segment_embed": "bert.embeddings.token_type_embeddings",
        "embed_norm": "bert.embeddings.LayerNorm",
        "head.transform.dense": "cls.predictions.transform.dense",
        "head.transform.norm": "cls.predictions.transform.LayerNorm",
        "head.bias": "cls.predictions.bias",
    }
    block = {"attn.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"}
    block |= {"mlp.up": "intermediate.dense", "mlp.down": "output.dense", "norm2": "output.LayerNorm"}
    qkv = [f"attention.self.{name}" for name in ("query", "key", "value")]
    return Layout("bert.encoder.layer.{i}", top, block, {"attn.qkv": (qkv, (cfg.dim,) * 3)})


def _gpt2_layout() -> Layout:
    top = {"embed": "transformer.wte", "position_embed": "transformer.wpe"}
    top |= {"norm": "transformer.ln_f", "head": "lm_head"}
    block = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj"}
    block |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    return Layout("transformer.h.{i}", top, block, {})


def _llama_layout(cfg: families.Decoder, kind: str) -> Layout:
    _, heads, kv_heads, head_dim, width = families.decoder_sizes(cfg)
    top = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj"}
    block |= {f"attn.{n}": f"self_attn.{n}" for n in ("q_norm", "k_norm")} | {"mlp.down": "mlp.down_proj"}
    qkv = [f"self_attn.{n}_proj" for n in "qkv"]
    fused = {"attn.qkv": (qkv, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))}
    if kind == "apertus":
        block |= {"norm1": "attention_layernorm", "norm2": "feedforward_layernorm"}
    if kind in ("arcee", "apertus"):
        block["mlp.up"] = "mlp.up_proj"
    else:
        fused["mlp.up"] = (["mlp.gate_proj", "mlp.up_proj"], (width, width))
    return Layout("model.layers.{i}", top, block, fused)


def _t5_names(cfg: families.EncoderDecoder) -> list[Name]:
    inner = cfg.heads * cfg.head_dim
    names = [Name("embed", ["shared"]), Name("head", ["lm_head"])]
    for ours, theirs, depth in (("", "encoder", cfg.depth), ("decoder.", "decoder", cfg.decoder_depth or cfg.depth)):
        bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias"
        names += [Name(f"{ours}relative", [bias]), Name(f"{ours}norm", [f"{theirs}.final_layer_norm"])]
        mlp_layer = 2 if ours else 1  # in the decoder, cross-attention is layer 1
        for i in range(depth):
            a, b = f"{ours}blocks.{i}", f"{theirs}.block.{i}.layer"
            names += [Name(f"{a}.norm{n + 1}", [f"{b}.{n}.layer_norm"]) for n in range(mlp_layer + 1)]
            names.append(Name(f"{a}.attn.qkv", [f"{b}.0.SelfAttention.{n}" for n in "qkv"], (inner,) * 3))
            names.append(Name(f"{a}.attn.proj", [f"{b}.0.SelfAttention.o"]))
            if ours:
                cross = f"{b}.1.EncDecAttention"
                names += [Name(f"{a}.cross.q", [f"{cross}.q"]), Name(f"{a}.cross.proj", [f"{cross}.o"])]
                names.append(Name(f"{a}.cross.kv", [f"{cross}.k", f"{cross}.v"], (inner,) * 2))
            mlp = f"{b}.{mlp_layer}.DenseReluDense"
            if cfg.mlp == "geglu":
                names.append(Name(f"{a}.mlp.up", [f"{mlp}.wi_0", f"{mlp}.wi_1"], (cfg.mlp_width,) * 2))
            else:
                names.append(Name(f"{a}.mlp.up", [f"{mlp}.wi"]))
            names.append(Name(f"{a}.mlp.down", [f"{mlp}.wo"]))
    return names


# ---------------------------------------------------------------- fields of config.json
def _llama(cfg: families.Decoder) -> dict[str, Any]:
    dim, heads, kv_heads, head_dim, width = families.decoder_sizes(cfg)
    return {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.context,
        "hidden_size": dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "hidden_act": "relu2" if cfg.mlp == "relu2" else "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        **({} if cfg.rope_factor == 1 else {"rope_scaling": _rope(cfg)}),
        "tie_word_embeddings": cfg.tied,
        "attention_bias": cfg.bias,
        "mlp_bias": cfg.bias,
    }


def _rope(cfg: families.Decoder) -> dict[str, Any]:
    if cfg.rope_factor == 1:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": cfg.rope_factor,
        "low_freq_factor": cfg.rope_low,
        "high_freq_factor": cfg.rope_high,
        "original_max_position_embeddings": cfg.rope_context,
    }


def _apertus(cfg: families.Decoder) -> dict[str, Any]:
    """Values for which the class has other defaults (scaled RoPE, ids of special tokens) are written explicitly; RoPE
    under two names, because versions of transformers differ in the name that they read."""
    fields = _llama(cfg)
    del fields["mlp_bias"]
    rope = None if cfg.rope_factor == 1 else _rope(cfg)
    return fields | {
        "rope_scaling": rope,
        "rope_parameters": {**_rope(cfg), "rope_theta": cfg.rope_base},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _qwen3(cfg: families.Decoder) -> dict[str, Any]:
    fields = _llama(cfg)
    del fields["mlp_bias"]
    if window := next((w for w in cfg.windows if w), None):
        names = [
            "sliding_attention" if cfg.windows[i % len(cfg.windows)] else "full_attention" for i in range(cfg.depth)
        ]
        fields |= {"use_sliding_window": True, "sliding_window": window, "layer_types": names}
    return fields


def _gpt2(cfg: families.Decoder) -> dict[str, Any]:
    dim, heads, _, _, width = families.decoder_sizes(cfg)
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context,
        "n_embd": dim,
        "n_layer": cfg.depth,
        "n_head": heads,
        "n_inner": width,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(cfg.mlp, cfg.mlp),
        "layer_norm_epsilon": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _bert(cfg: families.TextEncoder) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.context,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "intermediate_size": 4 * cfg.dim if cfg.mlp_width == "auto" else cfg.mlp_width,
        "hidden_act": "gelu",
        "layer_norm_eps": cfg.norm_eps,
        "type_vocab_size": cfg.segments,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    }


def _t5(cfg: families.EncoderDecoder) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context,
        "d_model": cfg.dim,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.mlp_width,
        "num_layers": cfg.depth,
        "num_decoder_layers": cfg.decoder_depth or cfg.depth,
        "num_heads": cfg.heads,
        "relative_attention_num_buckets": cfg.buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": cfg.norm_eps,
        "feed_forward_proj": "gated-gelu" if cfg.mlp == "geglu" else "relu",
        "tie_word_embeddings": cfg.tied,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    }


_FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama,
    "arcee": _llama,
    "qwen3": _qwen3,
    "apertus": _apertus,
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
}
