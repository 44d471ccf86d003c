"""Backbones by name: what each family's options are (`ViT`, `ResNet`), and the named sizes. Nothing here imports torch before `build`."""

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
    registers: int = 0
    layer_scale: float | None = None  # initial value; null: none
    qkv_bias: bool = True
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    mask_token: bool = False  # objectives that mask set this themselves


@dataclass
class ResNet(Section):
    """Residual network (arXiv 1512.03385), basic or bottleneck blocks. `stem: small` is one 3×3 convolution, for images below ~100 pixels."""

    in_channels: int = 3
    stem: Literal["imagenet", "small"] = "imagenet"
    block: Literal["basic", "bottleneck"] = "basic"
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2])


def _vit(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    return ViT, {"dim": dim, "depth": depth, "heads": heads, **more}


PRESETS: dict[str, tuple[type[Section], dict]] = {
    "vit": (ViT, {}),
    "vit_micro": _vit(96, 3, 3, image_size=32, patch_size=4),
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
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
    """The backbone that `cfg` (ViT or ResNet) describes, with some options changed, randomly initialised from torch's global generator."""
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
    from pretrain.models.resnet import ResidualNetwork

    return ResidualNetwork(cfg)
