"""The options of each family of backbones.

A family is a dataclass: `ViT`, `ConvNeXt`, `ResNet`, `Timm`; `VideoViT` for clips; `Decoder`, `TextEncoder` and
`EncoderDecoder` for text; `SpectrogramViT` and `Conformer` for audio.
`presets.py` has named sizes of them. This module does not import torch; `build.py` builds networks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from common.config import Facts, Section, option, option_if
from common.errors import ConfigError

# Limits of options, so that values from a damaged file do not make a network that takes all memory.
SIZE = {"low": 1, "high": 1 << 30}  # for widths and counts
DEPTH = {"low": 1, "high": 1000}  # for numbers of blocks
PIXELS = {"low": 1, "high": 32768}  # for sides of images
# Drop path rate of long runs for backbones up to each width; wider ones have 0.4.
DROP_PATH_BY_WIDTH = {192: 0.0, 384: 0.1, 768: 0.2, 1024: 0.3}


def drop_path(facts: Facts) -> float:
    """By width, in runs of 100 epochs or more; half of it in runs of 30; none in shorter ones."""
    width = facts.model.get("dim") or facts.model["widths"][-1]
    epochs = facts.steps * facts.batch / facts.samples
    rate = next((rate for w, rate in DROP_PATH_BY_WIDTH.items() if width <= w), 0.4)
    return rate if epochs >= 100 else rate / 2 if epochs >= 30 else 0.0


class Model(Section):
    """Base class of the options of a backbone. Its class variables tell other modules what the backbone can do."""

    reads: ClassVar[str]  # the part of a sample that the backbone reads: "image", "tokens", …
    writes: ClassVar[bool] = False  # whether it generates text (`unlabeled generate`)
    causal: ClassVar[bool] = False  # whether each token attends only to earlier ones, so that it can continue a text


@dataclass
class ViT(Model):
    """Vision transformer (arXiv 2010.11929). `dim` must be a multiple of `heads`; with rope, of 4 × `heads`."""

    reads = "image"
    # side of an image in pixels, for which position tables are made; they are interpolated for other sizes
    image_size: int = option(224, **PIXELS)
    patch_size: int = option(16, **SIZE)  # side of a patch in pixels
    in_channels: int = option(3, **SIZE)  # number of channels of an image
    dim: int = option(384, **SIZE)  # width of a token
    depth: int = option(12, **DEPTH)  # number of blocks
    heads: int = option(6, **SIZE)  # number of attention heads, each of width dim / heads
    mlp_ratio: float = option(4.0, above=0, high=1000)  # hidden width of a block's MLP, relative to dim
    # activation of the MLPs. gelu_tanh: GELU by its tanh formula, as in SigLIP; quick_gelu: x · sigmoid(1.702 x), as in
    # CLIP; swiglu: w3(silu(w1 x) · w2 x) (arXiv 2002.05202)
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    # learned and sincos: a table that is added to the tokens; rope: rotations of queries and keys
    positions: Literal["learned", "sincos", "rope"] = "learned"
    # a table of side N is resized to n with scale (n + position_offset) / N; 0.1 reproduces the released DINOv2 models
    # without registers at image sizes other than 518. transformers and timm have 0
    position_offset: float = option_if(0.0, "positions", unless="rope", low=0, below=1)
    # approximately the longest period of a rotation, in coordinates from -1 to 1
    rope_base: float = option_if(100.0, "positions", "rope", above=0)
    # training only: coordinates are multiplied by a random factor in [1/this, this], drawn for each block and image
    # size; null: no factor
    rope_rescale: float | None = option_if(None, "positions", "rope")
    rope_jitter: float | None = option_if(
        None, "positions", "rope"
    )  # the same with an independent factor for each axis
    # training only: the largest random shift of the coordinates
    rope_shift: float | None = option_if(None, "positions", "rope")
    # token: a class token; attention: no class token, a learned query attends to the patches in its place (SigLIP's
    # head, arXiv 2106.04560 appendix B)
    pooling: Literal["token", "attention"] = "token"
    embed_norm: bool = False  # whether the tokens are normalised before the first block, as in CLIP
    patch_bias: bool = True  # whether the patch embedding has a bias; CLIP has none
    # number of register tokens, which no loss uses (arXiv 2309.16588)
    registers: int = option(0, low=0)
    layer_scale: float | None = None  # initial value of LayerScale; null: none
    qkv_bias: bool = True  # whether queries, keys and values have biases
    key_bias: bool = True  # false: only queries and values have biases, as in DINOv3
    # drop path rate: the share of the images whose residual branch is skipped, the same in all blocks
    drop_path: float | Literal["auto"] = option(0.0, low=0, below=1, auto=drop_path)
    norm_eps: float = option(1e-6, above=0)  # added to the variance in LayerNorm
    # standard deviation of the initial weights of linear layers, and of class token, registers and learned positions.
    # 0.02 suits widths from 384 on; narrow networks need more: about 0.55 / sqrt(dim)
    initial_std: float = option(0.02, above=0, high=1)
    local_cls_norm: bool = False  # training only: whether class tokens of local crops have a separate final norm
    mask_token: bool = False  # whether there is a token that replaces masked patches; objectives set this themselves


@dataclass
class VideoViT(Model):
    """Vision transformer on clips, as in VideoMAE (arXiv 2203.12602) and V-JEPA 2 (2506.09985). A token is a cube of
    `tubelet` frames and `patch_size` × `patch_size` pixels. There is no class token; the mean of the tokens stands for
    it."""

    reads = "clip"
    image_size: int = option(224, **PIXELS)  # side of a frame in pixels
    frames: int = option(16, **SIZE)  # number of frames of a clip, a multiple of `tubelet`; `data.fps` is their rate
    patch_size: int = option(16, **SIZE)  # side of a token in pixels
    tubelet: int = option(2, **SIZE)  # number of frames of a token
    in_channels: int = option(3, **SIZE)  # number of channels of a frame
    dim: int = option(384, **SIZE)  # width of a token
    depth: int = option(12, **DEPTH)  # number of blocks
    heads: int = option(6, **SIZE)  # number of attention heads, each of width dim / heads
    mlp_ratio: float = option(4.0, above=0, high=1000)  # hidden width of a block's MLP, relative to dim
    # sequence: a sin-cos table of a token's number in the clip (VideoMAE), for clips of the given size only; sincos: of
    # its time, row and column (V-JEPA); rope: rotations of queries and keys by these three (V-JEPA 2)
    positions: Literal["sequence", "sincos", "rope"] = "sincos"
    qkv_bias: bool = True  # whether queries, keys and values have biases
    key_bias: bool = True  # false: only queries and values have biases, as in VideoMAE
    # drop path rate: the share of the clips whose residual branch is skipped, the same in all blocks
    drop_path: float | Literal["auto"] = option(0.0, low=0, below=1, auto=drop_path)
    norm_eps: float = option(1e-6, above=0)  # added to the variance in LayerNorm
    # standard deviation of the initial weights of linear layers, as in ViT; VideoMAE has Xavier's weights in their place
    initial_std: float = option(0.02, above=0, high=1)


@dataclass
class SpectrogramViT(ViT):
    """A ViT that reads log-mel spectrograms as images of one channel, with `image_size` mel bands from top to bottom and
    time from left to right. With rope, recordings may have any length."""

    reads = "audio"
    image_size: int = option(128, **PIXELS)  # number of mel bands, a multiple of the patch
    in_channels: int = option(1, low=1, high=1)  # a spectrogram has one channel
    positions: Literal["learned", "sincos", "rope"] = "rope"  # tables are made for a square, and resized

    @property
    def mels(self) -> int:
        return self.image_size


@dataclass
class ConvNeXt(Model):
    """ConvNeXt (arXiv 2201.03545) as DINOv3 distils it, with one norm for the pooled feature and the feature map. With
    four stages, a patch is 32 pixels wide."""

    reads = "image"
    # side of an image in pixels for evaluation; all multiples of the network's stride work
    image_size: int = option(224, **PIXELS)
    in_channels: int = option(3, **SIZE)  # number of channels of an image
    widths: list[int] = option(lambda: [96, 192, 384, 768], **SIZE)  # number of channels in each stage
    depths: list[int] = option(lambda: [3, 3, 9, 3], **DEPTH)  # number of blocks in each stage
    layer_scale: float | None = 1e-6  # initial value of LayerScale; null: none
    # drop path rate: the share of the images whose residual branch is skipped, the same in all blocks
    drop_path: float | Literal["auto"] = option(0.0, low=0, below=1, auto=drop_path)
    norm_eps: float = option(1e-6, above=0)  # added to the variance in LayerNorm


@dataclass
class ResNet(Model):
    """Residual network (arXiv 1512.03385). Use `stem: small` for images below about 100 pixels."""

    reads = "image"
    in_channels: int = option(3, **SIZE)  # number of channels of an image
    # imagenet: a 7×7 convolution with stride 2, and pooling; small: one 3×3 convolution
    stem: Literal["imagenet", "small"] = "imagenet"
    # basic: two 3×3 convolutions; bottleneck: 1×1, 3×3 and 1×1 convolutions, with four times the channels
    block: Literal["basic", "bottleneck"] = "basic"
    widths: list[int] = option(lambda: [64, 128, 256, 512], **SIZE)  # number of channels in each stage
    depths: list[int] = option(lambda: [2, 2, 2, 2], **DEPTH)  # number of blocks in each stage


@dataclass
class Timm(Model):
    """Any network of timm by its name there, randomly initialised: `model: {name: timm, architecture:
    convnextv2_atto}`. It accepts no masks."""

    reads = "image"
    architecture: str = "convnext_atto"  # a name that timm.list_models() lists
    image_size: int = option(224, **PIXELS)  # side of an image in pixels
    in_channels: int = option(3, **SIZE)  # number of channels of an image


@dataclass
class Decoder(Model):
    """Causal language model with pre-norm blocks: from GPT-2 (learned positions, LayerNorm, biases) to LLaMA and Qwen3
    (RoPE, RMSNorm, SwiGLU, GQA).

    `depth` is the size dial: the width is 64 · depth unless `dim` is given.
    """

    reads, writes, causal = "tokens", True, True
    vocab_size: int = option(50304, **SIZE)  # number of rows of the embedding; the tokenizer may have fewer tokens
    context: int = option(1024, **SIZE)  # length of the longest sequence in training
    depth: int = option(12, **DEPTH)  # number of blocks; the other sizes can follow from it (see above)
    dim: int | Literal["auto"] = option("auto", **SIZE)  # width of a token; auto: 64 · depth
    heads: int | Literal["auto"] = option("auto", **SIZE)  # number of query heads; auto: dim / head_dim
    # width of a head; auto: dim / heads, or 64 if heads is auto as well
    head_dim: int | Literal["auto"] = option("auto", **SIZE)
    # number of heads of keys and values, each of which serves heads / kv_heads query heads (arXiv 2305.13245); null: as
    # many as query heads
    kv_heads: int | None = option(None, **SIZE)
    # relu2: relu(x)² (arXiv 2109.08668); quick_gelu: x · sigmoid(1.702 x), as in CLIP
    mlp: Literal["swiglu", "relu2", "gelu", "gelu_tanh", "quick_gelu"] = "swiglu"
    # hidden width of a block's MLP; auto: with swiglu 8/3 · dim, rounded up to a multiple of 64, otherwise 4 · dim
    mlp_width: int | Literal["auto"] = option("auto", **SIZE)
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_eps: float = option(1e-5, above=0)  # added to the mean square, or to the variance
    bias: bool = False  # whether the linear layers except the head have biases
    # rope: rotations of queries and keys; learned: a table with `context` rows
    positions: Literal["rope", "learned"] = "rope"
    rope_base: float = option(10000.0, above=0)  # θ of RoPE (arXiv 2104.09864)
    # factor by which slow rotations are slowed down to extend the context, as in LLaMA 3.1; 1: not at all
    rope_factor: float = option(1.0, low=1)
    # rotations with fewer turns than this in `rope_context` tokens are slowed down by the whole factor
    rope_low: float = 1.0
    rope_high: float = 4.0  # rotations with more turns than this are not slowed down
    rope_context: int = option(8192, **SIZE)  # length of the context before it was extended
    qk_norm: bool = False  # RMSNorm of the queries and keys of each head before they are rotated, as in Qwen3
    # number of tokens that a token attends to in each block, itself included, repeated over the blocks; 0: all earlier
    # tokens. [256, 256, 256, 0] is the pattern of OLMo 3
    windows: list[int] = field(default_factory=list)
    tied: bool = False  # whether the head uses the weights of the embedding
    softcap: float | None = None  # logits become softcap · tanh(logits / softcap); null: unchanged
    # whether a token also attends to later ones, as in the text model of SigLIP, which writes no text
    bidirectional: bool = False
    # initial weights; muon: those of nanochat, with a standard deviation of 0.8 in the embedding, and zeros in the last
    # layers of attention and MLP
    init: Literal["normal", "muon"] = "normal"


@dataclass
class TextEncoder(Model):
    """BERT (arXiv 1810.04805): bidirectional post-norm blocks with learned positions. Its head has a hidden layer."""

    reads = "tokens"
    vocab_size: int = option(30522, **SIZE)  # number of rows of the embedding; the tokenizer may have fewer tokens
    context: int = option(512, **SIZE)  # number of rows of the position table
    depth: int = option(12, **DEPTH)  # number of blocks
    dim: int = option(768, **SIZE)  # width of a token
    heads: int = option(12, **SIZE)  # number of attention heads, each of width dim / heads
    mlp_width: int | Literal["auto"] = option("auto", **SIZE)  # hidden width of a block's MLP; auto: 4 · dim
    norm_eps: float = option(1e-12, above=0)  # added to the variance in LayerNorm
    segments: int = option(2, **SIZE)  # number of rows of the segment table, whose first row is added to every token


@dataclass
class EncoderDecoder(Model):
    """T5 (arXiv 1910.10683) without dropout: v1.0 (`mlp: relu`, `tied: true`) and v1.1 (`mlp: geglu`, `tied: false`).
    It has no biases, and attention scores are not scaled."""

    reads, writes = "tokens", True
    vocab_size: int = option(32128, **SIZE)  # number of rows of the embedding; the tokenizer may have fewer tokens
    # length of the longest sequence in training; positions are relative, so longer ones work, too
    context: int = option(512, **SIZE)
    dim: int = option(512, **SIZE)  # width of a token
    depth: int = option(6, **DEPTH)  # number of blocks of the encoder
    decoder_depth: int | None = option(None, **DEPTH)  # number of blocks of the decoder; null: as many as the encoder
    heads: int = option(8, **SIZE)  # number of attention heads
    head_dim: int = option(64, **SIZE)  # width of a head; heads × head_dim may differ from dim
    mlp_width: int = option(2048, **SIZE)  # hidden width of a block's MLP
    mlp: Literal["relu", "geglu"] = "relu"  # geglu: gated, with two input matrices
    norm_eps: float = option(1e-6, above=0)  # added to the mean square in RMSNorm
    buckets: int = option(32, low=4)  # number of buckets of relative distances
    max_distance: int = 128  # distances from this one on share a bucket
    tied: bool = True  # whether the head uses the weights of the embedding; its logits are then scaled by dim^-1/2


@dataclass
class Conformer(Model):
    """Conformer (arXiv 2005.08100) on log-mel features, in the form of w2v-BERT 2.0."""

    reads = "audio"
    mels: int = option(80, **SIZE)  # number of mel bands of a frame; a frame begins every 10 ms
    stack: int = option(4, **SIZE)  # number of consecutive frames that make a token
    dim: int = option(512, **SIZE)  # width of a token
    depth: int = option(12, **DEPTH)  # number of blocks
    heads: int = option(8, **SIZE)  # number of attention heads, each of width dim / heads
    # hidden width of the two feed-forward layers of a block; auto: 4 · dim
    mlp_width: int | Literal["auto"] = option("auto", **SIZE)
    kernel: int = option(31, **SIZE)  # number of tokens that the depthwise convolution sees: this one and earlier ones
    # the largest distance of an earlier token that attention distinguishes, in tokens; larger ones count as this one
    left: int = option(64, low=0, high=1 << 20)
    right: int = option(8, low=0, high=1 << 20)  # the same of a later token
    norm_eps: float = option(1e-5, above=0)  # added to the variance in LayerNorm


def decoder_sizes(cfg: Decoder) -> tuple[int, int, int, int, int]:
    """(dim, heads, kv_heads, head_dim, mlp_width) of a decoder, with every `auto` replaced.

    Raises ConfigError for sizes that do not fit each other.
    """
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
        raise ConfigError(f"model.head_dim = {head_dim}: rope rotates pairs of numbers; write an even number")
    if cfg.rope_factor != 1 and not 0 < cfg.rope_low < cfg.rope_high:
        raise ConfigError(
            f"model.rope_low = {cfg.rope_low}: must be above 0 and below model.rope_high = {cfg.rope_high}"
        )
    width = cfg.mlp_width
    if width == "auto":
        width = -(-8 * dim // 3 // 64) * 64 if cfg.mlp == "swiglu" else 4 * dim
    return dim, heads, kv_heads, head_dim, width
