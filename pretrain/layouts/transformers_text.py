"""transformers' layout of text models: LlamaForCausalLM, ArceeForCausalLM (LLaMA with relu2), Qwen3ForCausalLM, GPT2LMHeadModel, BertForMaskedLM and
T5ForConditionalGeneration; config.json's fields, and the tensors' names on disk.

A decoder whose options none of these classes has keeps our names, and `model_type` says `unlabeled_decoder`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.models import presets

State = dict[str, Tensor]
CLASSES = {
    "llama": "LlamaForCausalLM",
    "arcee": "ArceeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}
OWN = "unlabeled_decoder"
# what other classes around the same body have, buffers, and copies of tied tensors
_IGNORED = re.compile(
    r"(^|\.)(bert\.pooler\..*|cls\.seq_relationship\..*|embeddings\.position_ids|attn\.(masked_)?bias|rotary_emb\.inv_freq"
    r"|(encoder|decoder)\.embed_tokens\.weight|cls\.predictions\.decoder\.(weight|bias))$"
)


def is_text(cfg: Any) -> bool:
    return isinstance(cfg, (presets.Decoder, presets.TextEncoder, presets.EncoderDecoder))


def kind_of(cfg: Any) -> tuple[str, str]:
    """(model_type of the class that computes what a text model does, "") or (`OWN`, the option that no class has)."""
    if isinstance(cfg, presets.TextEncoder):
        return "bert", ""
    if isinstance(cfg, presets.EncoderDecoder):
        return "t5", ""
    dim, heads, kv_heads, head_dim, _ = presets.decoder_sizes(cfg)
    windows = {w for w in cfg.windows if w}
    if cfg.softcap is not None:
        return OWN, f"model.softcap = {cfg.softcap}"
    if cfg.positions == "learned":
        odd = {
            "norm": cfg.norm != "layer",
            "mlp": not cfg.mlp.startswith("gelu"),
            "bias": not cfg.bias,
            "qk_norm": cfg.qk_norm,
            "windows": bool(windows),
            "kv_heads": kv_heads != heads,
            "head_dim": heads * head_dim != dim,
        }
        kind = "gpt2"
    else:
        kind = "qwen3" if cfg.qk_norm else "arcee" if cfg.mlp == "relu2" else "llama"
        odd = {
            "norm": cfg.norm != "rms",
            "mlp": cfg.mlp not in (("swiglu",) if cfg.qk_norm else ("swiglu", "relu2")),
            "bias": cfg.bias and cfg.qk_norm,
            "windows": bool(windows) and (not cfg.qk_norm or len(windows) > 1),
            "heads": kind == "llama" and dim % heads > 0,
        }
    wrong = next((key for key, is_odd in odd.items() if is_odd), None)
    return (OWN, f"model.{wrong} = {vars(cfg)[wrong]}") if wrong else (kind, "")


def write(cfg: Any, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors under transformers' names) of our state dict."""
    kind, _ = kind_of(cfg)
    if kind == OWN:
        return {"model_type": OWN, "architectures": ["DecoderTransformer"], "vocab_size": cfg.vocab_size}, dict(state)
    out: State = {}
    for ours, theirs, sizes, turned in _names(cfg, kind):
        for suffix in ("", ".weight", ".bias"):
            if (tensor := state.get(ours + suffix)) is None:
                continue
            pieces = tensor.split(sizes) if sizes else [tensor]
            for target, piece in zip(theirs, pieces, strict=True):
                out[target + suffix] = (piece.t() if turned and piece.ndim == 2 else piece).clone().contiguous()
    return {"model_type": kind, "architectures": [CLASSES[kind]], **_FIELDS[kind](cfg)}, out


def read(cfg: Any, tensors: State, kind: str = "") -> State:
    """Our state dict of what `write` gave, or of a file of the class `kind`. Names that are not known stay as they are."""
    kind = kind or kind_of(cfg)[0]
    if kind == OWN:
        return dict(tensors)
    if kind == "gpt2":  # released files leave the prefix out
        known = ("transformer.", "lm_head.")
        tensors = {k if k.startswith(known) else f"transformer.{k}": v for k, v in tensors.items()}
    if kind == "bert":  # names of the first releases
        tensors = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", k): v for k, v in tensors.items()}
        tensors = {re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", k): v for k, v in tensors.items()}
    out: State = {}
    seen: set[str] = set()
    for ours, theirs, _, turned in _names(cfg, kind):
        for suffix in ("", ".weight", ".bias"):
            pieces = [tensors[target + suffix] for target in theirs if target + suffix in tensors]
            if len(pieces) != len(theirs):
                continue
            seen |= {target + suffix for target in theirs}
            pieces = [piece.t() if turned and piece.ndim == 2 else piece for piece in pieces]
            out[ours + suffix] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()
    if vars(cfg).get("tied", True):
        out.pop("head.weight", None)
    elif kind == "t5" and "embed.weight" in out:  # transformers ties it where the file has none
        out.setdefault("head.weight", out["embed.weight"])
    return out | {k: v for k, v in tensors.items() if k not in seen and not _IGNORED.search(k)}


# ---------------------------------------------------------------- names
Name = tuple[
    str, list[str], tuple[int, ...], bool
]  # ours, theirs (several where ours is fused), rows of each, transposed


def _names(cfg: Any, kind: str) -> list[Name]:
    if kind == "t5":
        return _t5_names(cfg)
    depth = range(cfg.depth)
    if kind == "bert":
        layer, mlp = "bert.encoder.layer.{i}", {"up": "intermediate.dense", "down": "output.dense"}
        top = {
            "embed": "bert.embeddings.word_embeddings",
            "position_embed": "bert.embeddings.position_embeddings",
            "segment_embed": "bert.embeddings.token_type_embeddings",
            "embed_norm": "bert.embeddings.LayerNorm",
            "head.transform.dense": "cls.predictions.transform.dense",
            "head.transform.norm": "cls.predictions.transform.LayerNorm",
            "head.bias": "cls.predictions.bias",
        }
        inner = {"attn.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"}
        inner |= {f"mlp.{ours}": theirs for ours, theirs in mlp.items()} | {"norm2": "output.LayerNorm"}
        fused = {"attn.qkv": [f"attention.self.{n}" for n in ("query", "key", "value")]}
        rows = {"attn.qkv": (cfg.dim,) * 3}
    elif kind == "gpt2":
        layer = "transformer.h.{i}"
        top = {"embed": "transformer.wte", "position_embed": "transformer.wpe"}
        top |= {"norm": "transformer.ln_f", "head": "lm_head"}
        inner = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj"}
        inner |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        fused, rows = {}, {}
    else:
        _, heads, kv_heads, head_dim, width = presets.decoder_sizes(cfg)
        layer = "model.layers.{i}"
        top = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        inner = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj"}
        inner |= {f"attn.{n}": f"self_attn.{n}" for n in ("q_norm", "k_norm")} | {"mlp.down": "mlp.down_proj"}
        fused = {"attn.qkv": [f"self_attn.{n}_proj" for n in "qkv"]}
        rows = {"attn.qkv": (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)}
        if kind == "arcee":
            inner["mlp.up"] = "mlp.up_proj"
        else:
            fused["mlp.up"], rows["mlp.up"] = ["mlp.gate_proj", "mlp.up_proj"], (width, width)
    conv = kind == "gpt2"  # Conv1D, which holds [in, out]
    out: list[Name] = [(ours, [theirs], (), False) for ours, theirs in top.items()]
    for i in depth:
        at = layer.replace("{i}", str(i))
        out += [(f"blocks.{i}.{a}", [f"{at}.{b}"], (), conv) for a, b in inner.items()]
        out += [(f"blocks.{i}.{a}", [f"{at}.{b}" for b in names], rows[a], False) for a, names in fused.items()]
    return out


def _t5_names(cfg: presets.EncoderDecoder) -> list[Name]:
    inner = cfg.heads * cfg.head_dim
    out: list[Name] = [("embed", ["shared"], (), False), ("head", ["lm_head"], (), False)]
    for ours, theirs, depth in (("", "encoder", cfg.depth), ("decoder.", "decoder", cfg.decoder_depth or cfg.depth)):
        bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias"
        out += [(f"{ours}relative", [bias], (), False), (f"{ours}norm", [f"{theirs}.final_layer_norm"], (), False)]
        last = 2 if ours else 1  # the MLP's place
        for i in range(depth):
            a, b = f"{ours}blocks.{i}", f"{theirs}.block.{i}.layer"
            out += [(f"{a}.norm{n + 1}", [f"{b}.{n}.layer_norm"], (), False) for n in range(last + 1)]
            out.append((f"{a}.attn.qkv", [f"{b}.0.SelfAttention.{n}" for n in "qkv"], (inner,) * 3, False))
            out.append((f"{a}.attn.proj", [f"{b}.0.SelfAttention.o"], (), False))
            if ours:
                cross = f"{b}.1.EncDecAttention"
                out += [(f"{a}.cross.q", [f"{cross}.q"], (), False), (f"{a}.cross.proj", [f"{cross}.o"], (), False)]
                out.append((f"{a}.cross.kv", [f"{cross}.k", f"{cross}.v"], (inner,) * 2, False))
            mlp, gated = f"{b}.{last}.DenseReluDense", cfg.mlp == "geglu"
            up = [f"{mlp}.wi_0", f"{mlp}.wi_1"] if gated else [f"{mlp}.wi"]
            out.append((f"{a}.mlp.up", up, (cfg.mlp_width,) * 2 if gated else (), False))
            out.append((f"{a}.mlp.down", [f"{mlp}.wo"], (), False))
    return out


# ---------------------------------------------------------------- config.json, out
def _llama(cfg: presets.Decoder) -> dict[str, Any]:
    dim, heads, kv_heads, head_dim, width = presets.decoder_sizes(cfg)
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
        "tie_word_embeddings": cfg.tied,
        "attention_bias": cfg.bias,
        "mlp_bias": cfg.bias,
    }


def _qwen3(cfg: presets.Decoder) -> dict[str, Any]:
    fields = _llama(cfg)
    del fields["mlp_bias"]
    if window := next((w for w in cfg.windows if w), None):
        names = [
            "sliding_attention" if cfg.windows[i % len(cfg.windows)] else "full_attention" for i in range(cfg.depth)
        ]
        fields |= {"use_sliding_window": True, "sliding_window": window, "layer_types": names}
    return fields


def _gpt2(cfg: presets.Decoder) -> dict[str, Any]:
    dim, heads, _, _, width = presets.decoder_sizes(cfg)
    return {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context,
        "n_embd": dim,
        "n_layer": cfg.depth,
        "n_head": heads,
        "n_inner": width,
        "activation_function": "gelu_new" if cfg.mlp == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _bert(cfg: presets.TextEncoder) -> dict[str, Any]:
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


def _t5(cfg: presets.EncoderDecoder) -> dict[str, Any]:
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
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
}
