"""transformers' layout of audio models: our Conformer is its `Wav2Vec2BertModel` without dropout, and the log-mel
features of `data_pipeline/views/log_mel.py` are those of its `SeamlessM4TFeatureExtractor`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.untrusted import loads, read_text, schema_error
from pretrain.models import families

State = dict[str, Tensor]
RATE = 16000  # Hz, at which windows of 25 ms have 400 samples
KIND, CLASS = "wav2vec2-bert", "Wav2Vec2BertModel"
DROPOUTS = (
    *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"),
    *("conformer_conv_dropout", "layerdrop", "mask_time_prob", "mask_feature_prob"),
)
_TOP = {"embed_norm": "feature_projection.layer_norm", "embed": "feature_projection.projection"}
_BLOCK = {  # {our name: transformers' name} in a block
    "norm1": "ffn1_layer_norm",
    "norm2": "self_attn_layer_norm",
    "norm3": "conv_module.layer_norm",
    "norm4": "ffn2_layer_norm",
    "norm5": "final_layer_norm",
    **{f"ffn{n}.up": f"ffn{n}.intermediate_dense" for n in (1, 2)},
    **{f"ffn{n}.down": f"ffn{n}.output_dense" for n in (1, 2)},
    "attn.distances": "self_attn.distance_embedding",
    "attn.proj": "self_attn.linear_out",
    "conv.gate": "conv_module.pointwise_conv1",
    "conv.depthwise": "conv_module.depthwise_conv",
    "conv.norm": "conv_module.depthwise_layer_norm",
    "conv.proj": "conv_module.pointwise_conv2",
}
_POINTWISE = ("conv.gate.weight", "conv.proj.weight")  # convolutions of one token, whose weights are [out, in, 1] there
_QKV = [f"self_attn.linear_{name}" for name in "qkv"]


def write(cfg: families.Conformer, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors under transformers' names) of our state dict."""
    out: State = {}
    for key, tensor in state.items():
        if key.endswith(_POINTWISE):
            tensor = tensor.unsqueeze(-1)
        prefix, name, suffix = _split(key)
        if name == "attn.qkv":
            for theirs, part in zip(_QKV, tensor.chunk(3), strict=True):
                out[f"{prefix}{theirs}{suffix}"] = part.clone().contiguous()
        else:
            out[f"{prefix}{(_BLOCK if prefix else _TOP)[name]}{suffix}"] = tensor.clone().contiguous()
    return {"model_type": KIND, "architectures": [CLASS], **_fields(cfg)}, out


def _split(key: str) -> tuple[str, str, str]:
    """(prefix of a block in transformers, "" outside of blocks; our name in the block; .weight or .bias) of our key."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)(\.\w+)", key)
    assert found is not None
    return (f"encoder.layers.{found[1]}." if found[1] else ""), found[2], found[3]


def read(cfg: families.Conformer, tensors: State) -> State:
    """Convert tensors under transformers' names to our state dict. Tensors with unknown names keep these names."""
    tensors = {k.removeprefix("wav2vec2_bert."): v for k, v in tensors.items()}
    names = {theirs: ours for ours, theirs in _BLOCK.items()}
    top = {theirs: ours for ours, theirs in _TOP.items()}
    out: State = {}
    for key, tensor in tensors.items():
        if key == "masked_spec_embed":  # which only transformers' own masking uses
            continue
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)(\.\w+)", key)
        name, _, suffix = key.rpartition(".")
        if found is None:
            out[f"{top.get(name, name)}.{suffix}"] = tensor
        elif found[2] in _QKV:
            if found[2] == _QKV[0]:
                parts = [tensors[f"encoder.layers.{found[1]}.{theirs}{found[3]}"] for theirs in _QKV]
                out[f"blocks.{found[1]}.attn.qkv{found[3]}"] = torch.cat(parts)
        else:
            ours = f"blocks.{found[1]}.{names.get(found[2], found[2])}{found[3]}"
            out[ours] = tensor.squeeze(-1) if ours.endswith(_POINTWISE) else tensor
    return out


def _fields(cfg: families.Conformer) -> dict[str, Any]:
    return {
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "intermediate_size": 4 * cfg.dim if cfg.mlp_width == "auto" else cfg.mlp_width,
        "feature_projection_input_dim": cfg.stack * cfg.mels,
        "hidden_act": "swish",
        "layer_norm_eps": cfg.norm_eps,
        "position_embeddings_type": "relative_key",
        "left_max_position_embeddings": cfg.left,
        "right_max_position_embeddings": cfg.right,
        "conv_depthwise_kernel_size": cfg.kernel,
        "add_adapter": False,
        "apply_spec_augment": False,
        **dict.fromkeys(DROPOUTS, 0.0),
    }


def extractor(cfg: families.Conformer, sample_rate: int) -> dict[str, Any] | None:
    """The content of preprocessor_config.json; None for other rates than 16 kHz, as transformers' extractor always has
    windows of 400 samples."""
    if sample_rate != RATE:
        return None
    return {
        "feature_extractor_type": "SeamlessM4TFeatureExtractor",
        "feature_size": cfg.mels,
        "num_mel_bins": cfg.mels,
        "sampling_rate": sample_rate,
        "stride": cfg.stack,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def describe(fields: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """(our model's name, its options) from the fields of config.json and the stride of the feature extractor in the
    folder `where`. Raises UserError if they describe something that our model does not have."""
    stride = _stride(Path(where) / "preprocessor_config.json")
    required = {"hidden_act": "swish", "position_embeddings_type": "relative_key", "add_adapter": False}
    for key, value in required.items():
        if fields.get(key, value) != value:
            raise UserError(f"{where}: {key} = {fields[key]!r} cannot be read; only {value!r} can")
    width = fields.get("feature_projection_input_dim", 160)
    if width % stride:
        raise UserError(
            f"{where}: feature_projection_input_dim = {width} is no multiple of the stride {stride} of the feature"
            " extractor (preprocessor_config.json)"
        )
    return "conformer", {
        "mels": width // stride,
        "stack": stride,
        "dim": fields.get("hidden_size", 1024),
        "depth": fields.get("num_hidden_layers", 24),
        "heads": fields.get("num_attention_heads", 16),
        "mlp_width": fields.get("intermediate_size", 4096),
        "kernel": fields.get("conv_depthwise_kernel_size", 31),
        "left": fields.get("left_max_position_embeddings", 64),
        "right": fields.get("right_max_position_embeddings", 8),
        "norm_eps": fields.get("layer_norm_eps", 1e-5),
    }


def _stride(file: Path) -> int:
    """The number of frames that make a token, from a preprocessor_config.json; the extractor's default if there is no
    such file."""
    try:
        values = loads(read_text(file))
    except FileNotFoundError:
        return 2
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if (wrong := schema_error(values, {"?stride": int})) or values.get("stride", 2) < 1:
        raise UserError(f"{file}: states no valid stride ({wrong or values['stride']})")
    return values.get("stride", 2)
