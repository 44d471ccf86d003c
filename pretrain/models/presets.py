"""Backbones by name: what each family's options are (`ViT`, `ConvNeXt`, `ResNet`; `Decoder`, `TextEncoder`, `EncoderDecoder` for text), and the named sizes.

Nothing here imports torch before `build`.
"""

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


@dataclass
class Decoder(Section):
    """Causal language model of pre-norm blocks, from GPT-2 (learned positions, LayerNorm, biases) to LLaMA and Qwen3 (RoPE, RMSNorm, SwiGLU, GQA).

    `depth` is the size dial: the width is 64 · depth unless `dim` says otherwise.
    """

    vocab_size: int = 50304  # rows of the embedding; a vocabulary may be smaller
    context: int = 1024  # longest sequence in training
    depth: int = 12
    dim: int | Literal["auto"] = "auto"  # auto: 64 · depth
    heads: int | Literal["auto"] = "auto"  # auto: dim / head_dim
    head_dim: int | Literal["auto"] = "auto"  # auto: dim / heads, or 64 where heads are auto, too
    kv_heads: int | None = None  # of keys and values, each for heads / kv_heads queries (arXiv 2305.13245); null: heads
    mlp: Literal["swiglu", "relu2", "gelu", "gelu_tanh"] = "swiglu"  # relu2: relu(x)² (arXiv 2109.08668)
    mlp_width: int | Literal["auto"] = (
        "auto"  # auto: 8/3 · dim rounded up to a multiple of 64 with swiglu, else 4 · dim
    )
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    bias: bool = False  # of all linear layers but the head
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = 10000.0
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before they are rotated, as in Qwen3
    windows: list[int] = field(
        default_factory=list
    )  # tokens that a block sees, itself among them, repeated over the blocks; 0: all. [256, 256, 256, 0] is OLMo 3's pattern
    tied: bool = False  # the head's weights are the embedding's
    softcap: float | None = None  # logits become softcap · tanh(logits / softcap); null: none
    init: Literal["normal", "muon"] = (
        "normal"  # muon: nanochat's, with an embedding of 0.8 and silent outputs of each block
    )


@dataclass
class TextEncoder(Section):
    """BERT (arXiv 1810.04805): bidirectional post-norm blocks with learned positions; the head transforms before it predicts."""

    vocab_size: int = 30522
    context: int = 512  # rows of the position table
    depth: int = 12
    dim: int = 768
    heads: int = 12
    mlp_width: int | Literal["auto"] = "auto"  # auto: 4 · dim
    norm_eps: float = 1e-12
    segments: int = 2  # rows of the table of segments, of which the first is added to every token


@dataclass
class EncoderDecoder(Section):
    """T5 (arXiv 1910.10683) without dropout: v1.0 (`mlp: relu`, `tied: true`) and v1.1 (`mlp: geglu`, `tied: false`). No biases; attention is not scaled."""

    vocab_size: int = 32128
    context: int = 512  # longest sequence in training; positions are relative, so any length is fine
    dim: int = 512
    depth: int = 6  # blocks of the encoder, and as many of the decoder unless `decoder_depth` says otherwise
    decoder_depth: int | None = None
    heads: int = 8
    head_dim: int = 64
    mlp_width: int = 2048
    mlp: Literal["relu", "geglu"] = "relu"
    norm_eps: float = 1e-6
    buckets: int = 32  # of relative distances
    max_distance: int = 128  # from which on all distances share a bucket
    tied: bool = True  # the head's weights are the embedding's, and its logits are scaled by dim^-1/2


def decoder_sizes(cfg: Decoder) -> tuple[int, int, int, int, int]:
    """(dim, heads, kv_heads, head_dim, mlp_width) of a decoder, with every `auto` settled. Raises ConfigError where they do not fit."""
    dim = 64 * cfg.depth if cfg.dim == "auto" else cfg.dim
    head_dim = cfg.head_dim
    if head_dim == "auto":
        head_dim = 64 if cfg.heads == "auto" else dim // cfg.heads
    heads = max(1, dim // head_dim) if cfg.heads == "auto" else cfg.heads
    kv_heads = cfg.kv_heads or heads
    if "auto" in (cfg.heads, cfg.head_dim) and heads * head_dim != dim:
        raise ConfigError(f"model.dim = {dim}: is no multiple of {heads} heads; write model.heads and model.head_dim")
    if heads % kv_heads:
        raise ConfigError(f"model.kv_heads = {kv_heads}: must divide model.heads = {heads}")
    if head_dim % 2 and cfg.positions == "rope":
        raise ConfigError(f"model.head_dim = {head_dim}: rope turns pairs; write an even number")
    width = cfg.mlp_width
    if width == "auto":
        width = -(-8 * dim // 3 // 64) * 64 if cfg.mlp == "swiglu" else 4 * dim
    return dim, heads, kv_heads, head_dim, width


def _vit(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    return ViT, {"dim": dim, "depth": depth, "heads": heads, **more}


def _dinov3(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    """The released models' options (arXiv 2508.10104); `rope_rescale` acts in training only."""
    options = {"positions": "rope", "registers": 4, "layer_scale": 1e-5, "norm_eps": 1e-5, "key_bias": False}
    return _vit(dim, depth, heads, **{"image_size": 256, "rope_rescale": 2.0, **options, **more})


def _dinov2(dim: int, depth: int, heads: int, **more: Any) -> tuple[type[ViT], dict]:
    """The released models' options (arXiv 2304.07193): position tables of 37 × 37 patches."""
    return _vit(dim, depth, heads, **{"image_size": 518, "patch_size": 14, "layer_scale": 1e-5, **more})


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
    "gpt": (Decoder, {"qk_norm": True}),
    "gpt_micro": (Decoder, {"qk_norm": True, "dim": 64, "depth": 2, "heads": 4, "vocab_size": 512, "context": 64}),
    "gpt2_124m": (Decoder, {**_GPT2, "dim": 768, "depth": 12, "heads": 12, "vocab_size": 50257}),
    "llama_160m": _llama(768, 12, 12, 3072, vocab_size=32000, context=2048, norm_eps=1e-6),
    "llama_1b": _llama3(2048, 16, 32, 8192, tied=True),
    "llama_8b": _llama3(4096, 32, 32, 14336),
    "bert_base": (TextEncoder, {}),
    "bert_micro": (TextEncoder, {"dim": 64, "depth": 2, "heads": 4, "vocab_size": 512, "context": 64}),
    "t5_small": _t5(512, 6, 8, 2048),
    "t5_base": _t5(768, 12, 12, 3072),
    "t5_v1_1_small": _t5(512, 8, 6, 1024, **_V1_1),
    "t5_v1_1_base": _t5(768, 12, 12, 2048, **_V1_1),
    "t5_micro": _t5(64, 2, 4, 128, head_dim=16, vocab_size=512, context=64),
}


def choose(name: str, where: str = "") -> tuple[type[Section], dict]:
    """(config class, preset values) of a named backbone."""
    if name not in PRESETS:
        raise ConfigError(f"{where}model.name = {name!r}: no such model; {nearest(name, PRESETS)}")
    return PRESETS[name]


def build(cfg: Any, **changes: Any) -> Backbone:
    """The backbone that `cfg` (a ViT, ConvNeXt, Decoder, …) describes, with some options changed, randomly initialised from torch's global generator."""
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
    if isinstance(cfg, Decoder):
        from pretrain.models.text import DecoderTransformer

        return DecoderTransformer(cfg)
    if isinstance(cfg, TextEncoder):
        from pretrain.models.text import EncoderTransformer

        return EncoderTransformer(cfg)
    if isinstance(cfg, EncoderDecoder):
        from pretrain.models.t5 import EncoderDecoderTransformer

        return EncoderDecoderTransformer(cfg)
    from pretrain.models.resnet import ResidualNetwork

    return ResidualNetwork(cfg)
