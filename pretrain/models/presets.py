"""Named sizes of backbones: `PRESETS` has the names that a recipe can give as `model`. Their options are in
`families.py`. This module does not import torch.
"""

from __future__ import annotations

from typing import Any

from common.errors import ConfigError, nearest
from pretrain.models.families import (
    Conformer,
    ConvNeXt,
    Decoder,
    EncoderDecoder,
    Model,
    ResNet,
    SpectrogramViT,
    TextEncoder,
    Timm,
    VideoViT,
    ViT,
)


def _vit(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    return ViT, {"dim": dim, "depth": depth, "heads": heads, **more}


def _dinov3(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    """The released models' options (arXiv 2508.10104); `rope_rescale` acts in training only."""
    options = {"positions": "rope", "registers": 4, "layer_scale": 1e-5, "norm_eps": 1e-5, "key_bias": False}
    return _vit(dim, depth, heads, **{"image_size": 256, "rope_rescale": 2.0, **options, **more})


def _dinov2(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    """The released models' options (arXiv 2304.07193): position tables of 37 × 37 patches."""
    return _vit(dim, depth, heads, **{"image_size": 518, "patch_size": 14, "layer_scale": 1e-5, **more})


def _videomae(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[VideoViT], dict]:
    """The released models' options (arXiv 2203.12602)."""
    options = {"dim": dim, "depth": depth, "heads": heads, "positions": "sequence", "key_bias": False}
    return VideoViT, {**options, **more}


def _vjepa2(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[VideoViT], dict]:
    """The released models' options (arXiv 2506.09985), with the 16 frames of the first and longest phase."""
    options = {"dim": dim, "depth": depth, "heads": heads, "positions": "rope", "image_size": 256}
    return VideoViT, {**options, **more}


_CLIP_IMAGE = {"mlp": "quick_gelu", "embed_norm": True, "patch_bias": False, "norm_eps": 1e-5}
# The text models of CLIP (arXiv 2103.00020) and SigLIP (2303.15343). Their head, which no loss uses, has no weights of
# its own.
_CLIP_TEXT = {"norm": "layer", "bias": True, "positions": "learned", "mlp": "quick_gelu", "tied": True}
_SIGLIP_TEXT = {**_CLIP_TEXT, "bidirectional": True, "norm_eps": 1e-6, "mlp": "gelu_tanh"}
_GPT2 = {"norm": "layer", "bias": True, "positions": "learned", "mlp": "gelu_tanh", "tied": True}


def _llama(dim: int, depth: int, heads: int, mlp_width: int, **more: Any) -> tuple[type[Decoder], dict]:
    return Decoder, {"dim": dim, "depth": depth, "heads": heads, "mlp_width": mlp_width, **more}


def _llama3(dim: int, depth: int, heads: int, mlp_width: int, **more: Any) -> tuple[type[Decoder], dict]:
    """LLaMA 3 (arXiv 2407.21783)."""
    options = {"kv_heads": 8, "vocab_size": 128256, "context": 8192, "rope_base": 500000.0}
    return _llama(dim, depth, heads, mlp_width, **options, **more)


def _t5(dim: int, depth: int, heads: int, mlp_width: int, **more: Any) -> tuple[type[EncoderDecoder], dict]:
    return EncoderDecoder, {"dim": dim, "depth": depth, "heads": heads, "mlp_width": mlp_width, **more}


_V1_1 = {"mlp": "geglu", "tied": False}


def _convnext(width: int, *depths: int) -> tuple[type[ConvNeXt], dict]:
    return ConvNeXt, {"widths": [width, 2 * width, 4 * width, 8 * width], "depths": list(depths)}


PRESETS: dict[str, tuple[type[Model], dict]] = {
    "vit": (ViT, {}),
    "vit_micro": _vit(96, 3, 3, image_size=32, patch_size=4),
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
    "clip_vitb16": _vit(768, 12, 12, **_CLIP_IMAGE),
    "clip_vitl14": _vit(1024, 24, 16, patch_size=14, **_CLIP_IMAGE),
    "siglip_vitb16": _vit(768, 12, 12, mlp="gelu_tanh", pooling="attention"),
    "siglip_vitl16": _vit(1024, 24, 16, mlp="gelu_tanh", pooling="attention", image_size=256),
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
    "video_vit": (VideoViT, {}),
    "videomae_micro": _videomae(96, 3, 3, image_size=32, patch_size=8, frames=8),
    "videomae_small": _videomae(384, 12, 6),
    "videomae_base": _videomae(768, 12, 12),
    "videomae_large": _videomae(1024, 24, 16),
    "videomae_huge": _videomae(1280, 32, 16),
    "vjepa2_micro": _vjepa2(96, 3, 3, image_size=32, patch_size=8, frames=8),
    "vjepa2_vitl16": _vjepa2(1024, 24, 16),
    "vjepa2_vith16": _vjepa2(1280, 32, 16),
    "vjepa2_vitg16": _vjepa2(1408, 40, 22, mlp_ratio=48 / 11),
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
    "gpt": (Decoder, {"qk_norm": True}),
    "gpt_micro": (Decoder, {"qk_norm": True, "dim": 64, "depth": 2, "heads": 4, "vocab_size": 512, "context": 64}),
    "gpt2_124m": (Decoder, {**_GPT2, "dim": 768, "depth": 12, "heads": 12, "vocab_size": 50257}),
    "clip_text": (Decoder, {**_CLIP_TEXT, "dim": 512, "depth": 12, "heads": 8, "vocab_size": 49408, "context": 77}),
    "siglip_text": (
        Decoder,
        {**_SIGLIP_TEXT, "dim": 768, "depth": 12, "heads": 12, "vocab_size": 32000, "context": 64},
    ),
    "llama_160m": _llama(768, 12, 12, 3072, vocab_size=32000, context=2048, norm_eps=1e-6),
    "llama_1b": _llama3(2048, 16, 32, 8192, tied=True),
    "llama_8b": _llama3(4096, 32, 32, 14336),
    "bert_base": (TextEncoder, {}),
    "bert_micro": (TextEncoder, {"dim": 64, "depth": 2, "heads": 4, "vocab_size": 512, "context": 64}),
    "t5_small": _t5(512, 6, 8, 2048),
    "t5_base": _t5(768, 12, 12, 3072),
    "t5_v1_1_small": _t5(512, 8, 6, 1024, **_V1_1),
    "t5_v1_1_base": _t5(768, 12, 12, 2048, **_V1_1),
    "spectrogram_vit": (SpectrogramViT, {}),
    "spectrogram_vit_micro": (SpectrogramViT, {"dim": 96, "depth": 3, "heads": 3, "image_size": 64, "patch_size": 8}),
    "spectrogram_vit_base": (SpectrogramViT, {"dim": 768, "depth": 12, "heads": 12}),
    "conformer": (Conformer, {}),
    "conformer_micro": (Conformer, {"dim": 64, "depth": 2, "heads": 4, "kernel": 15}),
    "conformer_small": (Conformer, {"dim": 256, "depth": 16, "heads": 4}),
    "conformer_large": (Conformer, {"dim": 512, "depth": 17, "heads": 8}),
    "conformer_xl": (Conformer, {"dim": 1024, "depth": 24, "heads": 8, "kernel": 5}),
    "w2v_bert_2": (Conformer, {"stack": 2, "dim": 1024, "depth": 24, "heads": 16}),
    "t5_micro": _t5(64, 2, 4, 128, head_dim=16, vocab_size=512, context=64),
}


def choose(name: str, where: str = "") -> tuple[type[Model], dict]:
    """(class of the options, preset values) of a named backbone. Raises ConfigError that begins with `where`."""
    if name not in PRESETS:
        raise ConfigError(f"{where}model.name = {name!r}: no such model; {nearest(name, PRESETS)}")
    return PRESETS[name]
