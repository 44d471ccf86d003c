"""Compare two model configs in the options that must be equal, so that weights of one model give the same features in
the other."""

from __future__ import annotations

import json
from typing import Any

from pretrain.models import families

# Options that determine the names and shapes of a model's tensors.
SHAPE_OPTIONS = (
    *("dim", "depth", "widths", "depths", "decoder_depth", "vocab_size", "head_dim", "mlp_width", "mlp_ratio"),
    *("context", "segments", "in_channels", "registers", "layer_scale", "qkv_bias", "bias"),
    *("pooling", "embed_norm", "patch_bias"),
    *("mels", "stack", "kernel", "left", "right"),
)
# Options of a decoder that have an effect only if `rope_factor` is not 1.
ROPE_SCALING_OPTIONS = ("rope_low", "rope_high", "rope_context")
# Options that determine how a model computes with its tensors.
COMPUTATION_OPTIONS = (
    *("heads", "patch_size", "positions", "rope_base", "mlp", "norm_eps", "block", "stem", "architecture", "tubelet"),
    *("norm", "qk_norm", "windows", "softcap", "tied", "buckets", "max_distance", "rope_factor", "bidirectional"),
    "kv_heads",
    *ROPE_SCALING_OPTIONS,
)


def incompatible_options(ours: Any, theirs: Any, section: str = "model") -> dict[str, tuple[Any, Any]]:
    """{"SECTION.KEY": (value here, value of the source)} of the options that differ but must be equal. Both configs are
    of one class."""
    compared = (*SHAPE_OPTIONS, *COMPUTATION_OPTIONS)
    here, there = _effective_options(ours), _effective_options(theirs)
    differing = {k for k in compared if k in here and here[k] != there[k]}
    if here.get("positions") != "rope":
        differing.discard("rope_base")
    if here.get("rope_factor") == there.get("rope_factor") == 1:
        differing -= {*ROPE_SCALING_OPTIONS}
    if {here.get("positions"), there.get("positions")} == {"learned", "sincos"}:
        differing.discard("positions")
    if here.get("layer_scale") is not None:  # allowed: the source's layer scales are loaded, or ones if it has none
        differing.discard("layer_scale")
    return {f"{section}.{k}": (here[k], there[k]) for k in compared if k in differing}


def describe_differences(differing: dict[str, tuple[Any, Any]]) -> str:
    """Part of an error message: the options that differ, {key: (value here, value of the source)}, and the overrides
    that set them to the source's values."""
    differences = ", ".join(f"{k} is {here!r} here and {there!r} there" for k, (here, there) in differing.items())
    overrides = " ".join(
        f"{k}={v if isinstance(v, str) else json.dumps(v).replace(' ', '')}" for k, (_, v) in differing.items()
    )
    return f"{differences}; write {overrides}"


def _effective_options(cfg: Any) -> dict[str, Any]:
    """The values of a config for a comparison: "auto" values are resolved, and options that have no effect on this
    model are set to None or []."""
    options = dict(vars(cfg))
    if isinstance(cfg, families.Decoder):
        dim, heads, kv_heads, head_dim, width = families.decoder_sizes(cfg)
        windows = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.depth)] if any(cfg.windows) else []
        options |= {"dim": dim, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "mlp_width": width}
        options |= {"windows": windows, "context": cfg.context if cfg.positions == "learned" else None}
    elif isinstance(cfg, (families.TextEncoder, families.Conformer)):
        options["mlp_width"] = 4 * cfg.dim if cfg.mlp_width == "auto" else cfg.mlp_width
    elif isinstance(cfg, families.EncoderDecoder):
        options |= {"decoder_depth": cfg.decoder_depth or cfg.depth, "context": None}
    elif isinstance(cfg, families.ViT):
        # the ratio for the integer width that the MLP has
        options["mlp_ratio"] = int(cfg.dim * cfg.mlp_ratio + 1e-6) / cfg.dim
    return options
