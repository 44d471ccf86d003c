"""The layout of transformers for image models: fields of config.json and names of tensors (the names of transformers 4,
which version 5 reads, too).

A ViT with rotary positions becomes a `dinov3_vit`, any other ViT a `dinov2` (with registers: `dinov2_with_registers`),
a ConvNeXt a `dinov3_convnext`, and a ResNet with the ImageNet stem a `resnet`. A model without layer scales is written
with layer scales of one. `vit` and the encoder of `vit_mae` can be read but not written. A ViT with the options of CLIP
or SigLIP that these classes do not have keeps our names, and its `model_type` is `unlabeled_vit`. Text models are in
`transformers_text.py`, models of audio in `transformers_audio.py`, and models of clips in
`transformers_video.py`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from pretrain.interchange.layouts import (
    transformers_audio,
    transformers_image_text,
    transformers_text,
    transformers_video,
)
from pretrain.models import families
from pretrain.models.build import build_model

State = dict[str, Tensor]


def write(cfg: Any, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors) of our state dict."""
    if transformers_text.is_text(cfg):
        return transformers_text.write(cfg, state)
    if isinstance(cfg, families.Conformer):
        return transformers_audio.write(cfg, state)
    if isinstance(cfg, families.VideoViT):
        return transformers_video.write(cfg, state)
    if isinstance(cfg, families.ViT):
        if has_own_layout(cfg):
            return {"model_type": "unlabeled_vit", "architectures": ["VisionTransformer"]}, dict(state)
        return vit_to_transformers(cfg, state)
    if isinstance(
        cfg, families.Timm
    ):  # a network of timm, whose create_model("local-dir:FOLDER") opens the folder, too
        fields = {"model_type": "timm_wrapper", "architecture": cfg.architecture, "num_classes": 0}
        pixels = {"input_size": [cfg.in_channels, cfg.image_size, cfg.image_size], "num_classes": 0}
        fields |= {"model_args": {"in_chans": cfg.in_channels}, "pretrained_cfg": pixels}
        return fields, {k.removeprefix("network."): v for k, v in state.items()}
    return (convnext_to_transformers if isinstance(cfg, families.ConvNeXt) else resnet_to_transformers)(cfg, state)


def read(cfg: Any, tensors: State, kind: str = "") -> State:
    """Convert to our state dict the tensors that `write` has written, or those of a file for transformers' class with
    the model_type `kind`."""
    if transformers_text.is_text(cfg):
        return transformers_text.read(cfg, tensors, kind)
    if isinstance(cfg, families.Conformer):
        return transformers_audio.read(cfg, tensors)
    if kind in transformers_image_text.KINDS:
        return transformers_image_text.read_image(cfg, tensors, kind)
    if isinstance(cfg, families.VideoViT):
        return transformers_video.read(cfg, tensors, kind)
    if isinstance(cfg, families.ViT):
        return dict(tensors) if has_own_layout(cfg) else vit_from_transformers(cfg, tensors, kind)
    if isinstance(cfg, families.Timm):
        return {f"network.{k}": v for k, v in tensors.items()}
    if isinstance(cfg, families.ConvNeXt):
        out = {_our_convnext_key(key): value for key, value in tensors.items()}
        return {k: v for k, v in out.items() if cfg.layer_scale is not None or not k.endswith(".gamma")}
    if cfg.stem == "small":
        return tensors
    our_names = {_resnet_key(cfg, key): key for key in build_model(cfg).state_dict()}
    return {our_names.get(key, key): value for key, value in tensors.items()}


def feature_extractor(cfg: Any, audio: dict[str, Any]) -> dict[str, Any] | None:
    """The content of preprocessor_config.json for a model of audio; None if transformers has no extractor that computes
    its input. `audio`: `Part.facts` of the part."""
    if isinstance(cfg, families.Conformer):
        return transformers_audio.extractor(cfg, audio.get("sample_rate", transformers_audio.RATE))
    return None


# ---------------------------------------------------------------- ViT
def has_own_layout(cfg: families.ViT) -> bool:
    """Whether none of transformers' classes for a ViT alone computes this one."""
    return cfg.pooling == "attention" or cfg.embed_norm or not cfg.patch_bias


# {our name of an MLP: transformers' name of its activation}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "swiglu": "silu"}


def _vit_layout(cfg: families.ViT) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(fields of config.json, [(our name, transformers' name)] of the tensors, without .weight and .bias).

    {i} stands for the number of a block. [j] after a name stands for part j of a tensor that only this side fuses: our
    tensor for query, key and value, or transformers' tensor for the two matrices of a gated MLP.
    """
    rope = cfg.positions == "rope"
    ratio, hidden = _mlp_width(cfg)
    fields: dict[str, Any] = {
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "patch_size": cfg.patch_size,
        "image_size": cfg.image_size,
        "num_channels": cfg.in_channels,
        "layer_norm_eps": cfg.norm_eps,
        "layerscale_value": cfg.layer_scale if cfg.layer_scale is not None else 1.0,
    }
    block, attention = ("layer.{i}", "attention") if rope else ("encoder.layer.{i}", "attention.attention")
    qkv = ("q_proj", "k_proj", "v_proj") if rope else ("query", "key", "value")
    names = [
        ("cls_token", "embeddings.cls_token"),
        ("registers", "embeddings.register_tokens"),
        ("mask_token", "embeddings.mask_token"),
        ("patch_embed", "embeddings.patch_embeddings" if rope else "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("norm", "norm" if rope else "layernorm"),
        *((f"blocks.{{i}}.{n}", f"{block}.{n}") for n in ("norm1", "norm2")),
        *((f"blocks.{{i}}.attn.qkv[{j}]", f"{block}.{attention}.{name}") for j, name in enumerate(qkv)),
        ("blocks.{i}.attn.proj", f"{block}.attention.o_proj" if rope else f"{block}.attention.output.dense"),
        ("blocks.{i}.ls1.gamma", f"{block}.layer_scale1.lambda1"),
        ("blocks.{i}.ls2.gamma", f"{block}.layer_scale2.lambda1"),
    ]
    if rope:
        mlp = {"fc1": "up_proj", "fc2": "down_proj"}
        if cfg.mlp == "swiglu":
            mlp = {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"}
        fields |= {
            "model_type": "dinov3_vit",
            "architectures": ["DINOv3ViTModel"],
            "num_register_tokens": cfg.registers,
        }
        fields |= {"rope_theta": cfg.rope_base, "intermediate_size": hidden, "use_gated_mlp": cfg.mlp == "swiglu"}
        fields |= {"hidden_act": ACTIVATIONS[cfg.mlp], "mlp_bias": True, "proj_bias": True}
        fields |= dict.fromkeys(("query_bias", "value_bias"), cfg.qkv_bias) | {
            "key_bias": cfg.qkv_bias and cfg.key_bias
        }
        fields |= {
            "pos_embed_shift": cfg.rope_shift,
            "pos_embed_jitter": cfg.rope_jitter,
            "pos_embed_rescale": cfg.rope_rescale,
        }
    else:
        mlp = {"fc1": "fc1", "fc2": "fc2"}
        if cfg.mlp == "swiglu":
            mlp = {"w1": "weights_in[0]", "w2": "weights_in[1]", "w3": "weights_out"}
        kind = ("dinov2_with_registers", "Dinov2WithRegistersModel") if cfg.registers else ("dinov2", "Dinov2Model")
        fields |= {"model_type": kind[0], "architectures": [kind[1]], "qkv_bias": cfg.qkv_bias}
        fields["hidden_act"] = ACTIVATIONS[cfg.mlp] if cfg.mlp != "swiglu" else "gelu"
        fields |= {"use_swiglu_ffn": cfg.mlp == "swiglu", "mlp_ratio": ratio}
        fields |= {"num_register_tokens": cfg.registers} if cfg.registers else {"use_mask_token": cfg.mask_token}
    names += [(f"blocks.{{i}}.mlp.{a}", f"{block}.mlp.{b}") for a, b in mlp.items()]
    return fields, names


def _mlp_width(cfg: families.ViT) -> tuple[int, int]:
    """(mlp_ratio, hidden width) for transformers' class. Dinov2 allows only whole ratios; with SwiGLU its width is two
    thirds of dim · ratio, rounded up to a multiple of 8. Returns the smallest width of this kind that is not below
    ours."""
    ratio, hidden = 1, int(cfg.dim * cfg.mlp_ratio + 1e-6)
    if cfg.positions == "rope":
        return ratio, hidden
    while (width := cfg.dim * ratio if cfg.mlp != "swiglu" else (cfg.dim * ratio * 2 // 3 + 7) // 8 * 8) < hidden:
        ratio += 1
    return ratio, width


def _resize_mlps(state: State, width: int) -> State:
    """The state dict with the hidden width of every MLP changed to `width`: units are cut off, or units of zero weight
    are added, which do not change the output."""
    out = dict(state)
    for key, tensor in state.items():
        if re.search(r"mlp\.(fc1|w1|w2)\.", key):
            out[key] = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, width - len(tensor)))
        elif re.search(r"mlp\.(fc2|w3)\.weight", key):
            out[key] = F.pad(tensor, (0, width - tensor.shape[1]))
    return out


def vit_to_transformers(cfg: families.ViT, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors with transformers' names) for our state dict. The norm for class tokens of local
    crops is left out, because only training uses it."""
    fields, names = _vit_layout(cfg)
    width = cfg.dim
    state = {k: v for k, v in state.items() if not k.startswith("local_cls_norm.")}
    state = _resize_mlps(state, _mlp_width(cfg)[1])
    if cfg.qkv_bias and not cfg.key_bias:
        state |= {k: with_key_bias(v) for k, v in state.items() if k.endswith("qkv.bias")}
    if cfg.layer_scale is None:
        ones = torch.ones(width)
        state |= {f"blocks.{i}.ls{n}.gamma": ones for i in range(cfg.depth) for n in (1, 2)}
    if not cfg.mask_token and (cfg.positions == "rope" or cfg.registers):  # classes that always have a mask token
        state["mask_token"] = torch.zeros(1, width)
    if cfg.positions == "rope":
        state["mask_token"] = state["mask_token"].unsqueeze(0)  # [1, 1, D]
        state.setdefault("registers", torch.zeros(1, 0, width))  # the class has this tensor even without registers
    out: State = {}
    for ours, theirs in _for_each_block(names, cfg.depth):
        for suffix in ("", ".weight", ".bias"):
            base, _, part = ours.partition("[")
            if (tensor := state.get(base + suffix)) is None:
                continue
            if part:  # one third of our fused query, key and value
                tensor = tensor.chunk(3)[int(part[0])]
            target, _, half = theirs.partition("[")
            if half == "1]":  # the second half of transformers' fused gated MLP
                tensor = torch.cat([out.pop(target + suffix), tensor])
            out[target + suffix] = tensor.clone().contiguous()
    if cfg.positions == "rope" and not cfg.key_bias:
        out = {k: v for k, v in out.items() if not k.endswith("k_proj.bias")}
    return fields, out


def with_key_bias(bias: Tensor) -> Tensor:
    """Insert zeros for the keys: biases of queries and values [2·D] become those of queries, keys and values [3·D]."""
    query, value = bias.chunk(2)
    return torch.cat([query, torch.zeros_like(query), value])


def without_key_bias(bias: Tensor, key: str) -> Tensor:
    """The inverse of `with_key_bias`; a bias [2·D] is returned unchanged. Raises UserError if the biases of the keys
    are not zero."""
    if len(bias) % 3 or bias.ndim != 1:
        return bias
    query, key_bias, value = bias.chunk(3)
    if key_bias.any():
        raise UserError(f"{key}: the keys have biases, but model.key_bias is false; write model.key_bias=true")
    return torch.cat([query, value])


_MODEL_PREFIXES = ("vit.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.")
_OTHER_PARTS = ("pooler.", "decoder.", "classifier.")  # prefixes of tensors outside the backbone


def vit_from_transformers(cfg: families.ViT, tensors: State, kind: str = "") -> State:
    """Convert tensors with transformers' names to our state dict, the inverse of `vit_to_transformers`. Tensors with
    unknown names keep these names."""
    for prefix in _MODEL_PREFIXES:
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if not k.startswith(_OTHER_PARTS)}
    names = _plain_vit_names() if kind in ("vit", "vit_mae") else _vit_layout(cfg)[1]
    out: State = {}
    used = set()
    for ours, theirs in _for_each_block(names, cfg.depth):
        for suffix in ("", ".weight", ".bias"):
            target, _, half = theirs.partition("[")
            if (tensor := tensors.get(target + suffix)) is None:
                continue
            used.add(target + suffix)
            if half:
                tensor = tensor.chunk(2)[int(half[0])]
            base, _, part = ours.partition("[")
            if part:
                tensor = torch.cat([out[base + suffix], tensor]) if base + suffix in out else tensor
            out[base + suffix] = tensor
    if cfg.layer_scale is None:
        out = {k: v for k, v in out.items() if not k.endswith(".gamma")}
    if not cfg.key_bias:
        out |= {
            k: without_key_bias(v, k) if len(v) == 3 * cfg.dim else v for k, v in out.items() if k.endswith("qkv.bias")
        }
    if not cfg.registers:
        out.pop("registers", None)
    if not cfg.mask_token:
        out.pop("mask_token", None)
    elif "mask_token" in out:
        out["mask_token"] = out["mask_token"].reshape(1, cfg.dim)
    return _resize_mlps(out, int(cfg.dim * cfg.mlp_ratio + 1e-6)) | {k: v for k, v in tensors.items() if k not in used}


def _plain_vit_names() -> list[tuple[str, str]]:
    """[(our name, transformers' name)] for `ViTModel` and `ViTMAEModel`, as in `_vit_layout`."""
    block = "encoder.layer.{i}"
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {f"attn.qkv[{j}]": f"attention.attention.{n}" for j, n in enumerate(("query", "key", "value"))}
    return [
        ("cls_token", "embeddings.cls_token"),
        ("mask_token", "embeddings.mask_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed", "embeddings.patch_embeddings.projection"),
        ("norm", "layernorm"),
        *((f"blocks.{{i}}.{ours}", f"{block}.{theirs}") for ours, theirs in names.items()),
    ]


def _for_each_block(names: list[tuple[str, str]], depth: int) -> list[tuple[str, str]]:
    """Repeat each name with {i} for every block."""
    return [
        (ours.replace("{i}", str(i)), theirs.replace("{i}", str(i)))
        for ours, theirs in names
        for i in range(depth if "{i}" in ours else 1)
    ]


# ---------------------------------------------------------------- ConvNeXt
def convnext_to_transformers(cfg: families.ConvNeXt, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors with transformers' names) for our state dict."""
    fields = {
        "model_type": "dinov3_convnext",
        "architectures": ["DINOv3ConvNextModel"],
        "num_channels": cfg.in_channels,
        "hidden_sizes": cfg.widths,
        "depths": cfg.depths,
        "hidden_act": "gelu",
        "layer_norm_eps": cfg.norm_eps,
        "layer_scale_init_value": cfg.layer_scale if cfg.layer_scale is not None else 1.0,
        "image_size": cfg.image_size,
    }
    if cfg.layer_scale is None:
        blocks = [(s, b, w) for s, (d, w) in enumerate(zip(cfg.depths, cfg.widths, strict=True)) for b in range(d)]
        state = state | {f"stages.{s}.{b}.gamma": torch.ones(w) for s, b, w in blocks}
    return fields, {_convnext_key(key): value for key, value in state.items()}


_CONVNEXT_NAMES = {  # {our name in a block: transformers'}
    "dwconv": "depthwise_conv",
    "norm": "layer_norm",
    "pwconv1": "pointwise_conv1",
    "pwconv2": "pointwise_conv2",
    "gamma": "gamma",
}


def _convnext_key(key: str) -> str:
    """transformers' name for a tensor of our ConvNeXt."""
    key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample_layers.", key)
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.(\w+)", lambda m: f"stages.{m[1]}.layers.{m[2]}.{_CONVNEXT_NAMES[m[3]]}", key)
    return re.sub(r"^norm\.", "layer_norm.", key)


def _our_convnext_key(key: str) -> str:
    """The inverse of `_convnext_key`."""
    names = {theirs: ours for ours, theirs in _CONVNEXT_NAMES.items()}
    key = key.removeprefix("model.")
    key = re.sub(r"^stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1.", key)
    key = re.sub(
        r"^stages\.(\d+)\.layers\.(\d+)\.(\w+)", lambda m: f"stages.{m[1]}.{m[2]}.{names.get(m[3], m[3])}", key
    )
    return re.sub(r"^layer_norm\.", "norm.", key)


# ---------------------------------------------------------------- ResNet
def resnet_to_transformers(cfg: families.ResNet, state: State) -> tuple[dict[str, Any], State]:
    """(fields of config.json, tensors under transformers' names) of our state dict. A ResNet with the small stem keeps
    our names, because transformers has no such class."""
    if cfg.stem == "small":
        return {"model_type": "unlabeled_resnet", "architectures": ["ResidualNetwork"]}, state
    expansion = 4 if cfg.block == "bottleneck" else 1
    fields = {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "num_channels": cfg.in_channels,
        "embedding_size": cfg.widths[0],
        "hidden_sizes": [w * expansion for w in cfg.widths],
        "depths": cfg.depths,
        "layer_type": cfg.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
    }
    return fields, {_resnet_key(cfg, key): value for key, value in state.items()}


def _resnet_key(cfg: families.ResNet, key: str) -> str:
    """transformers' name of a tensor of ours."""
    stages = [(s, i) for s, depth in enumerate(cfg.depths) for i in range(depth)]
    key = re.sub(r"^stem\.0", "embedder.embedder", key)
    key = re.sub(r"^blocks\.(\d+)", lambda m: "encoder.stages.{}.layers.{}".format(*stages[int(m[1])]), key)
    key = re.sub(r"\.layers\.(\d+)\.([01])\.", r".layer.\1.\2.", key) if key.count(".layers.") > 1 else key
    return re.sub(r"\.0\.(?=weight)", ".convolution.", re.sub(r"\.1\.(?=\w+$)", ".normalization.", key))
