"""The layout of DINOv2's and DINOv3's own files, for ViT and ConvNeXt: names of tensors in both directions, and the
model's options from the shapes of its tensors.

Hub files hold the backbone alone; training files hold {"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}}, of
which the backbone is read. DINOv2's training files number blocks in chunks (blocks.CHUNK.BLOCK). The official files
store biases of attention keys, with a mask that sets them to zero; our models have no such biases.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from pretrain.interchange.layouts.transformers import State, with_key_bias, without_key_bias
from pretrain.models import families
from pretrain.models.positions import rope_periods

ROPE_PERIODS = "rope_embed.periods"


def unwrap(file: dict[str, Any], where: str) -> State:
    """The backbone's tensors in the content of a file. Raises UserError if there are none."""
    for outer in ("teacher", "model", "state_dict"):
        if isinstance(file.get(outer), dict):
            file = file[outer]
    tensors = {k.removeprefix("module."): v for k, v in file.items() if isinstance(v, Tensor)}
    if any(k.startswith("backbone.") for k in tensors):
        tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    if not tensors:
        raise UserError(f"{where}: holds no tensors of a backbone; its keys are {', '.join(list(map(str, file))[:5])}")
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in tensors.items()}


def matches(tensors: State) -> bool:
    """Whether tensors have the names of an official file."""
    return "downsample_layers.0.0.weight" in tensors or (
        "cls_token" in tensors and "patch_embed.proj.weight" in tensors
    )


# ---------------------------------------------------------------- which model
def describe(tensors: State, where: str) -> tuple[str, dict[str, Any]]:
    """(name of our model, its options), from the shapes of the tensors. The number of rotary periods determines the
    width of a head; in DINOv2, which has none, the width is 64."""
    if "downsample_layers.0.0.weight" in tensors:
        stages = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("stages."))
        depths = [1 + max(int(k.split(".")[2]) for k in tensors if k.startswith(f"stages.{s}.")) for s in range(stages)]
        widths = [len(tensors[f"stages.{s}.0.dwconv.weight"]) for s in range(stages)]
        return "convnext", {
            "widths": widths,
            "depths": depths,
            "in_channels": tensors["downsample_layers.0.0.weight"].shape[1],
        }
    kernel = tensors["patch_embed.proj.weight"]  # [D, C, p, p]
    dim, patch = len(kernel), kernel.shape[-1]
    rope = ROPE_PERIODS in tensors
    head_dim = 4 * len(tensors[ROPE_PERIODS]) if rope else 64
    if dim % head_dim:
        raise UserError(
            f"{where}: is not a DINOv2 or DINOv3 ViT: its width {dim} is not a multiple of the width of a head,"
            f" {head_dim}"
        )
    gated = "blocks.0.mlp.fc1.weight" not in tensors
    first_mlp = {"fc1": 1, "w1": 1, "w12": 2}  # {name of the first MLP layer: number of matrices that are fused in it}
    hidden = next(
        len(tensors[f"blocks.0.mlp.{name}.weight"]) // fused
        for name, fused in first_mlp.items()
        if f"blocks.0.mlp.{name}.weight" in tensors
    )
    registers = tensors.get("storage_tokens", tensors.get("register_tokens"))
    side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5) if "pos_embed" in tensors else 16
    options = {
        "dim": dim,
        "heads": dim // head_dim,
        "depth": 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")),
        "patch_size": patch,
        "in_channels": kernel.shape[1],
        "image_size": side * patch,
        "mlp": "swiglu" if gated else "gelu",
        "mlp_ratio": hidden / dim,
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "key_bias": "blocks.0.attn.qkv.bias_mask" not in tensors,
        "mask_token": "mask_token" in tensors,
        "positions": "rope" if rope else "learned",
        "norm_eps": 1e-5 if rope else 1e-6,
        "local_cls_norm": "local_cls_norm.weight" in tensors,
    }
    if rope:
        options["rope_base"] = _rope_base(tensors[ROPE_PERIODS], where)
        options["key_bias"] = options["key_bias"] and options["qkv_bias"]
    return "vit", options


def _rope_base(periods: Tensor, where: str) -> float:
    """The base of rotary periods, which are the numbers base^(2k / (head_dim / 2)), perhaps rounded to bf16."""
    base = round(float(periods[-1].double()) ** (len(periods) / (len(periods) - 1))) if len(periods) > 1 else 100
    if not torch.allclose(rope_periods(4 * len(periods), base), periods.float(), rtol=1e-2):
        raise UserError(
            f"{where}: {ROPE_PERIODS}, from {periods[0]:.4g} to {periods[-1]:.4g}, are not powers of one base"
        )
    return float(base)


# ---------------------------------------------------------------- names
def _names(cfg: families.ViT) -> dict[str, str]:
    """{our name: official name} of the tensors whose names differ."""
    registers = "storage_tokens" if cfg.positions == "rope" else "register_tokens"
    return {
        "registers": registers,
        "patch_embed.weight": "patch_embed.proj.weight",
        "patch_embed.bias": "patch_embed.proj.bias",
    }


def read(cfg: Any, tensors: State) -> State:
    """Convert tensors with official names to our state dict. Tensors with unknown names keep these names."""
    if isinstance(cfg, families.ConvNeXt):
        last = f"norms.{len(cfg.widths) - 1}."  # the same tensors as `norm`
        return {k: v for k, v in tensors.items() if not k.startswith(last)}
    our_names = {theirs: ours for ours, theirs in _names(cfg).items()}
    state: State = {}
    for key, value in tensors.items():
        if key == ROPE_PERIODS or key.endswith(".bias_mask"):
            continue
        if key.endswith("qkv.bias") and not cfg.key_bias:
            mask = tensors.get(key + "_mask")
            if mask is not None:  # the mask sets the bias of the keys to zero, so its stored value has no meaning
                value = torch.cat([value[: cfg.dim], torch.zeros_like(value[: cfg.dim]), value[2 * cfg.dim :]])
            value = without_key_bias(value, key)
        if ".mlp.w12." in key:
            for name, half in zip(("w1", "w2"), value.chunk(2), strict=True):
                state[key.replace("w12", name)] = half
            continue
        if key == "mask_token" and not cfg.mask_token:
            continue
        state[our_names.get(key, key)] = value
    return state


def write(cfg: Any, state: State) -> State:
    """Convert our state dict to official names: for rotary positions those of DINOv3, otherwise those of DINOv2, which
    fuses w1 and w2 of a gated MLP. Raises UserError for a model that neither of them has."""
    if isinstance(cfg, families.ConvNeXt):
        last = len(cfg.widths) - 1
        return state | {f"norms.{last}.{part}": state[f"norm.{part}"].clone() for part in ("weight", "bias")}
    if not isinstance(cfg, families.ViT):
        raise UserError(
            f"model.name = {cfg.name}: cannot be written in the official format, which has ViTs and ConvNeXts only"
        )
    if cfg.pooling == "attention" or cfg.embed_norm or not cfg.patch_bias or cfg.mlp not in ("gelu", "swiglu"):
        raise UserError(
            f"model.pooling = {cfg.pooling}, model.embed_norm = {cfg.embed_norm}, model.mlp = {cfg.mlp}: cannot be"
            " written in the official format, which has class tokens, no such norm, and the MLPs gelu and swiglu"
        )
    names, rope = _names(cfg), cfg.positions == "rope"
    out: State = {}
    for key, value in state.items():
        if key.endswith("qkv.bias") and not cfg.key_bias:
            value = with_key_bias(value)
            if rope:
                out[key + "_mask"] = torch.cat([torch.ones(cfg.dim), torch.zeros(cfg.dim), torch.ones(cfg.dim)])
        if not rope and ".mlp.w1." in key:
            out[key.replace("w1", "w12")] = torch.cat([value, state[key.replace("w1", "w2")]])
        elif rope or ".mlp.w2." not in key:
            out[names.get(key, key)] = value
    if rope:
        out[ROPE_PERIODS] = rope_periods(cfg.dim // cfg.heads, cfg.rope_base)
    return out
