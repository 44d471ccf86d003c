"""Backbones by name: what each family's options are (`ViT`, `ConvNeXt`, `ResNet`), and the named sizes. Nothing here imports torch before `build`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pretrain.config import ConfigError, Section, fields
from pretrain.errors import nearest

if TYPE_CHECKING:
    from pretrain.models.layers import Backbone


@dataclass
class ViT(Section):
    """Vision transformer (arXiv 2010.11929). Sizes in pixels; `dim` must be a multiple of `heads`, with rope of 4 × `heads`."""

    image_size: int = 224  # of the learned or sin-cos position table; other sizes are interpolated
    patch_size: int = 16
    in_channels: int = 3
    dim: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    positions: Literal["learned", "sincos", "rope"] = "learned"
    rope_base: float = 100.0
    rope_rescale: float | None = (
        None  # in training, a random factor in [1/this, this] on all coordinates, drawn for each block and size; null: none
    )
    rope_jitter: float | None = None  # the same, on each axis by itself
    rope_shift: float | None = None  # in training, coordinates (of [-1, 1]) move by up to this
    registers: int = 0
    layer_scale: float | None = None  # initial value; null: none
    qkv_bias: bool = True
    key_bias: bool = True  # false: biases for queries and values only, as in DINOv3
    drop_path: float | Literal["auto"] = 0.0  # share of the images that a residual leaves out, the same in all blocks
    norm_eps: float = 1e-6
    local_cls_norm: bool = False  # in training, the class token of local crops has a last norm of its own
    mask_token: bool = False  # objectives that mask set this themselves


@dataclass
class ConvNeXt(Section):
    """ConvNeXt (arXiv 2201.03545) as DINOv3 distils it: one norm over the pooled map and its cells. Patches of 32 pixels with four stages."""

    image_size: int = 224  # what evaluation shows it; any other multiple of its stride is fine
    in_channels: int = 3
    widths: list[int] = field(default_factory=lambda: [96, 192, 384, 768])
    depths: list[int] = field(default_factory=lambda: [3, 3, 9, 3])
    layer_scale: float | None = 1e-6  # initial value; null: none
    drop_path: float | Literal["auto"] = 0.0
    norm_eps: float = 1e-6


@dataclass
class ResNet(Section):
    """Residual network (arXiv 1512.03385), basic or bottleneck blocks. `stem: small` is one 3×3 convolution, for images below ~100 pixels."""

    in_channels: int = 3
    stem: Literal["imagenet", "small"] = "imagenet"
    block: Literal["basic", "bottleneck"] = "basic"
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2])


@dataclass
class Timm(Section):
    """Any network of timm by its name there, randomly initialised: `model: {name: timm, architecture: convnextv2_atto}`. Takes no masks."""

    architecture: str = "convnext_atto"
    image_size: int = 224
    in_channels: int = 3


def _vit(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    return ViT, {"dim": dim, "depth": depth, "heads": heads, **more}


def _dinov3(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    """The released models' options (arXiv 2508.10104); `rope_rescale` acts in training only."""
    options = {"positions": "rope", "registers": 4, "layer_scale": 1e-5, "norm_eps": 1e-5, "key_bias": False}
    return _vit(dim, depth, heads, **{"image_size": 256, "rope_rescale": 2.0, **options, **more})


def _dinov2(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    """The released models' options (arXiv 2304.07193): position tables of 37 × 37 patches."""
    return _vit(dim, depth, heads, **{"image_size": 518, "patch_size": 14, "layer_scale": 1e-5, **more})


def _convnext(width: int, *depths: int) -> tuple[type[ConvNeXt], dict]:
    return ConvNeXt, {"widths": [width, 2 * width, 4 * width, 8 * width], "depths": list(depths)}


PRESETS: dict[str, tuple[type[Section], dict]] = {
    "vit": (ViT, {}),
    "vit_micro": _vit(96, 3, 3, image_size=32, patch_size=4),
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
    "vit_giant": _vit(1536, 40, 24, mlp="swiglu", mlp_ratio=8 / 3),
    "dinov2_vits14": _dinov2(384, 12, 6),
    "dinov2_vitb14": _dinov2(768, 12, 12),
    "dinov2_vitl14": _dinov2(1024, 24, 16),
    "dinov2_vitg14": _dinov2(1536, 40, 24, mlp="swiglu", mlp_ratio=8 / 3),
    "dinov3_vits16": _dinov3(384, 12, 6),
    "dinov3_vits16plus": _dinov3(384, 12, 6, mlp="swiglu"),
    "dinov3_vitb16": _dinov3(768, 12, 12),
    "dinov3_vitl16": _dinov3(1024, 24, 16),
    "dinov3_vitl16plus": _dinov3(1024, 24, 16, mlp="swiglu"),
    "dinov3_vith16plus": _dinov3(1280, 32, 20, mlp="swiglu"),
    "dinov3_vit7b16": _dinov3(4096, 40, 32, mlp="swiglu", mlp_ratio=2.0, qkv_bias=False, local_cls_norm=True),
    "convnext": (ConvNeXt, {}),
    "convnext_micro": (ConvNeXt, {"image_size": 64, "widths": [24, 48, 96, 192], "depths": [1, 1, 2, 1]}),
    "convnext_tiny": _convnext(96, 3, 3, 9, 3),
    "convnext_small": _convnext(96, 3, 3, 27, 3),
    "convnext_base": _convnext(128, 3, 3, 27, 3),
    "convnext_large": _convnext(192, 3, 3, 27, 3),
    "timm": (Timm, {}),
    "resnet": (ResNet, {}),
    "resnet_micro": (ResNet, {"stem": "small", "widths": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}),
    "resnet18": (ResNet, {}),
    "resnet50": (ResNet, {"block": "bottleneck", "depths": [3, 4, 6, 3]}),
}


def choose(name: str, where: str = "") -> tuple[type[Section], dict]:
    """(config class, preset values) of a named backbone."""
    if name not in PRESETS:
        raise ConfigError(f"{where}model.name = {name!r}: no such model; {nearest(name, PRESETS)}")
    return PRESETS[name]


def build(cfg: Any, **changes: Any) -> Backbone:
    """The backbone that `cfg` (ViT, ConvNeXt or ResNet) describes, with some options changed, randomly initialised from torch's global generator."""
    for key in changes:
        if key not in fields(type(cfg)):
            family = type(cfg).__name__
            raise ConfigError(
                f"model.name = {cfg.name!r}: the objective sets model.{key}, which a {family} does not have; choose a ViT (model=vit_small)"
            )
    cfg = cfg.replace(**changes)
    if isinstance(cfg, ViT):
        from pretrain.models.vit import VisionTransformer

        return VisionTransformer(cfg)
    if isinstance(cfg, ConvNeXt):
        from pretrain.models.convnext import ConvolutionalNetwork

        return ConvolutionalNetwork(cfg)
    if isinstance(cfg, Timm):
        from pretrain.models.timm_network import TimmNetwork

        return TimmNetwork(cfg)
    from pretrain.models.resnet import ResidualNetwork

    return ResidualNetwork(cfg)
