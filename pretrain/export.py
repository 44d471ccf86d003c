"""Export: a folder config.json + model.safetensors that `transformers.AutoModel.from_pretrained` and `load` open.

A ViT with rotary positions is written as `dinov3_vit`, any other as `dinov2` (with registers: `dinov2_with_registers`), a ResNet with the ImageNet
stem as `resnet`; absent layer scales are written as ones. The key `unlabeled` of config.json holds what `load` needs.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import config
from pretrain.errors import UserError
from pretrain.models import presets
from pretrain.models.layers import Backbone
from pretrain.objectives.base import Objective
from pretrain.recipe import Recipe

State = dict[str, Tensor]


# ---------------------------------------------------------------- ViT
def _vit_layout(cfg: presets.ViT) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(config.json of transformers, [(our key pattern, its key pattern)]); {i} stands for a block's number."""
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
    names = ("q_proj", "k_proj", "v_proj") if rope else ("query", "key", "value")
    keys = [
        ("cls_token", "embeddings.cls_token"),
        ("registers", "embeddings.register_tokens"),
        ("mask_token", "embeddings.mask_token"),
        ("patch_embed", "embeddings.patch_embeddings" if rope else "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("norm", "norm" if rope else "layernorm"),
        *((f"blocks.{{i}}.{n}", f"{block}.{n}") for n in ("norm1", "norm2")),
        *((f"blocks.{{i}}.attn.qkv[{j}]", f"{block}.{attention}.{name}") for j, name in enumerate(names)),
        ("blocks.{i}.attn.proj", f"{block}.attention.o_proj" if rope else f"{block}.attention.output.dense"),
        ("blocks.{i}.ls1.gamma", f"{block}.layer_scale1.lambda1"),
        ("blocks.{i}.ls2.gamma", f"{block}.layer_scale2.lambda1"),
    ]
    if rope:
        mlp = {
            "gelu": {"fc1": "up_proj", "fc2": "down_proj"},
            "swiglu": {"w1": "gate_proj", "w2": "up_proj", "w3": "down_proj"},
        }[cfg.mlp]
        fields |= {
            "model_type": "dinov3_vit",
            "architectures": ["DINOv3ViTModel"],
            "num_register_tokens": cfg.registers,
        }
        fields |= {"rope_theta": cfg.rope_base, "intermediate_size": hidden, "use_gated_mlp": cfg.mlp == "swiglu"}
        fields |= {"hidden_act": "silu" if cfg.mlp == "swiglu" else "gelu", "mlp_bias": True, "proj_bias": True}
        fields |= dict.fromkeys(("query_bias", "key_bias", "value_bias"), cfg.qkv_bias)
    else:
        mlp = {
            "gelu": {"fc1": "fc1", "fc2": "fc2"},
            "swiglu": {"w1": "weights_in[0]", "w2": "weights_in[1]", "w3": "weights_out"},
        }[cfg.mlp]
        kind = ("dinov2_with_registers", "Dinov2WithRegistersModel") if cfg.registers else ("dinov2", "Dinov2Model")
        fields |= {"model_type": kind[0], "architectures": [kind[1]], "qkv_bias": cfg.qkv_bias, "hidden_act": "gelu"}
        fields |= {"use_swiglu_ffn": cfg.mlp == "swiglu", "mlp_ratio": ratio}
        fields |= {"num_register_tokens": cfg.registers} if cfg.registers else {"use_mask_token": cfg.mask_token}
    keys += [(f"blocks.{{i}}.mlp.{a}", f"{block}.mlp.{b}") for a, b in mlp.items()]
    return fields, keys


def _mlp_width(cfg: presets.ViT) -> tuple[int, int]:
    """(mlp_ratio, hidden width) of transformers' class. Dinov2 takes whole ratios only, and two thirds of them, rounded up to a multiple of 8,
    for SwiGLU: the smallest that holds ours."""
    ratio, hidden = 1, int(cfg.dim * cfg.mlp_ratio)
    if cfg.positions == "rope":
        return ratio, hidden
    while (width := cfg.dim * ratio if cfg.mlp == "gelu" else (cfg.dim * ratio * 2 // 3 + 7) // 8 * 8) < hidden:
        ratio += 1
    return ratio, width


def _resize_mlps(state: State, width: int) -> State:
    """Every MLP's hidden width cut to `width`, or filled up with units of zero weight, which change no output."""
    out = dict(state)
    for key, tensor in state.items():
        if re.search(r"mlp\.(fc1|w1|w2)\.", key):
            out[key] = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, width - len(tensor)))
        elif re.search(r"mlp\.(fc2|w3)\.weight", key):
            out[key] = F.pad(tensor, (0, width - tensor.shape[1]))
    return out


def vit_to_transformers(cfg: presets.ViT, state: State) -> tuple[dict[str, Any], State]:
    """(config.json, tensors under transformers' names) of our state dict."""
    fields, keys = _vit_layout(cfg)
    width = cfg.dim
    state = _resize_mlps({k: v for k, v in state.items() if k != "periods"}, _mlp_width(cfg)[1])
    if cfg.layer_scale is None:
        ones = torch.ones(width)
        state |= {f"blocks.{i}.ls{n}.gamma": ones for i in range(cfg.depth) for n in (1, 2)}
    if not cfg.mask_token and (cfg.positions == "rope" or cfg.registers):  # these two classes always have one
        state["mask_token"] = torch.zeros(1, width)
    if cfg.positions == "rope":
        state["mask_token"] = state["mask_token"].unsqueeze(0)  # [1, 1, D]
        state.setdefault("registers", torch.zeros(1, 0, width))  # there too where there are none
    out: State = {}
    for ours, theirs in _named(keys, cfg.depth):
        for suffix in ("", ".weight", ".bias"):
            base, _, part = ours.partition("[")
            if (tensor := state.get(base + suffix)) is None:
                continue
            if part:  # a third of the fused query, key, value
                tensor = tensor.chunk(3)[int(part[0])]
            target, _, half = theirs.partition("[")
            if half == "1]":  # the second half of transformers' fused gate
                tensor = torch.cat([out.pop(target + suffix), tensor])
            out[target + suffix] = tensor.clone().contiguous()
    return fields, out


def vit_from_transformers(cfg: presets.ViT, tensors: State) -> State:
    """Our state dict from tensors under transformers' names (the inverse of `vit_to_transformers`)."""
    _, keys = _vit_layout(cfg)
    out: State = {}
    for ours, theirs in _named(keys, cfg.depth):
        for suffix in ("", ".weight", ".bias"):
            target, _, half = theirs.partition("[")
            if (tensor := tensors.get(target + suffix)) is None:
                continue
            if half:
                tensor = tensor.chunk(2)[int(half[0])]
            base, _, part = ours.partition("[")
            if part:
                tensor = torch.cat([out[base + suffix], tensor]) if base + suffix in out else tensor
            out[base + suffix] = tensor
    if cfg.layer_scale is None:
        out = {k: v for k, v in out.items() if not k.endswith(".gamma")}
    if not cfg.registers:
        out.pop("registers", None)
    if not cfg.mask_token:
        out.pop("mask_token", None)
    elif "mask_token" in out:
        out["mask_token"] = out["mask_token"].reshape(1, cfg.dim)
    return _resize_mlps(out, int(cfg.dim * cfg.mlp_ratio))


def _named(keys: list[tuple[str, str]], depth: int) -> list[tuple[str, str]]:
    return [
        (ours.replace("{i}", str(i)), theirs.replace("{i}", str(i)))
        for ours, theirs in keys
        for i in range(depth if "{i}" in ours else 1)
    ]


# ---------------------------------------------------------------- ResNet
def resnet_to_transformers(cfg: presets.ResNet, state: State) -> tuple[dict[str, Any], State]:
    """(config.json, tensors under transformers' names); a ResNet with the small stem keeps our names, as transformers has no such class."""
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


def _resnet_key(cfg: presets.ResNet, key: str) -> str:
    stages = [(s, i) for s, depth in enumerate(cfg.depths) for i in range(depth)]
    key = re.sub(r"^stem\.0", "embedder.embedder", key)
    key = re.sub(r"^blocks\.(\d+)", lambda m: "encoder.stages.{}.layers.{}".format(*stages[int(m[1])]), key)
    key = re.sub(r"\.layers\.(\d+)\.([01])\.", r".layer.\1.\2.", key) if key.count(".layers.") > 1 else key
    return re.sub(r"\.0\.(?=weight)", ".convolution.", re.sub(r"\.1\.(?=\w+$)", ".normalization.", key))


# ---------------------------------------------------------------- folders
def write(
    folder: Path,
    encoder: Backbone,
    about: dict[str, Any],
    mean: list[float],
    std: list[float],
    state: State | None = None,
) -> None:
    """Write an encoder as a folder, atomically, and read it back to see that nothing was lost. `state`: weights to write in place of its own."""
    cfg: Any = encoder.cfg
    if state is None:
        state = {key: value.detach().cpu() for key, value in encoder.state_dict().items()}
    fields, tensors = (vit_to_transformers if isinstance(cfg, presets.ViT) else resnet_to_transformers)(cfg, state)
    fields["dtype"] = "float32"
    fields["unlabeled"] = {"model": config.to_dict(cfg), "mean": mean, "std": std, **about}
    processor = {  # the short side resized, the middle cropped: what `data_pipeline.views.center` shows to evaluation
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": encoder.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": encoder.image_size, "width": encoder.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    (partial / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    again = load(partial)[0].state_dict()
    lost = [key for key in state if not torch.equal(again[key], state[key])]
    if lost:
        raise RuntimeError(f"{folder}: the export does not hold what was written: {', '.join(lost[:5])}")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def save(folder: Path, objective: Objective, recipe: Recipe, step: int, state: State | None = None) -> None:
    """Export an objective's encoder at a step of its run; a folder that is there is left as it is.

    `state`: the encoder's whole weights in main memory, where an engine has spread them (`Engine.encoder_state`).
    """
    if (folder / "config.json").is_file():
        return
    about = {"step": step, "objective": recipe.objective.name, "pool": objective.pool}
    write(folder, objective.encoder(), about, recipe.data.mean, recipe.data.std, state)


def load(folder: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """(the encoder in eval mode, what the folder says of itself: model, mean, std, pool, step, objective)."""
    folder = Path(folder)
    try:
        fields = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: is no exported model ({Path(error.filename).name} is missing); a run keeps its exports in RUN/export/STEP"
        ) from None
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({error}); export it again with `unlabeled export RUN`") from None
    if "unlabeled" not in fields:
        raise UserError(f"{folder}: was not written by unlabeled (config.json has no key `unlabeled`)")
    about = fields["unlabeled"]
    name = about["model"]["name"]
    cls, defaults = presets.choose(name, f"{folder}: ")
    cfg = config.build(
        cls, {k: v for k, v in about["model"].items() if k != "name"}, {"": str(folder)}, "model.", defaults
    )
    cfg.name = name
    encoder = presets.build(cfg)
    own = encoder.state_dict()
    if isinstance(cfg, presets.ViT):
        state = vit_from_transformers(cfg, tensors)
    else:
        state = {
            key: tensors[theirs]
            for key in own
            if (theirs := _resnet_key(cfg, key) if cfg.stem != "small" else key) in tensors
        }
    state |= {"periods": own["periods"]} if "periods" in own else {}
    if missing := [f"missing {k}" for k in own.keys() - state.keys()] + [
        f"unexpected {k}" for k in state.keys() - own.keys()
    ]:
        raise UserError(f"{folder}: its weights do not fit its config: {', '.join(sorted(missing)[:5])}")
    encoder.load_state_dict(state)
    return encoder.eval(), about
