"""The size dial of decoders: what follows from `model.depth` where a recipe says `auto` for its steps, its batch or its learning rate.

    width = 64 · depth                                   heads of 64                            (pretrain/models/presets.py)
    N = weights of all matrices and the head             D = 12 · N tokens in the run           (nanochat; Chinchilla's 20 count embeddings, too)
    C = 6 · N · D                                        FLOPs
    batch = 0.2920 · C^0.3271 tokens, as a power of 2    lr = 0.3118 · C^-0.1250                (DeepSeek LLM, arXiv 2401.02954, eq. 1)

Muon's updates are as long as AdamW's (pretrain/muon.py), so both take this rate. The laws were fitted between 1e17 and 2e19 FLOPs: depths of 8 to 16.
"""

from __future__ import annotations

import math

from pretrain import config
from pretrain.config import ConfigError, Section
from pretrain.models.presets import Decoder, decoder_sizes
from pretrain.schedules import Schedule

AUTO = "auto"
TOKENS = 12  # for each weight


def weights(cfg: Decoder) -> int:
    """N: those that a token is multiplied with."""
    dim, heads, kv_heads, head_dim, width = decoder_sizes(cfg)
    attention = dim * head_dim * (2 * heads + 2 * kv_heads)
    return cfg.depth * (attention + (3 if cfg.mlp == "swiglu" else 2) * dim * width) + dim * cfg.vocab_size


def budget(cfg: Decoder) -> tuple[int, int, float]:
    """(tokens of the run, tokens of a step, learning rate)."""
    n = weights(cfg)
    tokens = TOKENS * n
    compute = 6.0 * n * tokens
    return tokens, 2 ** round(math.log2(0.2920 * compute**0.3271)), 0.3118 * compute**-0.1250


def turn(recipe: Section) -> list[str]:
    """Put values in place of every `auto` that the dial is for; "key = value (rule)" for each. Raises ConfigError where it is not for it."""
    stored = vars(recipe)
    data, optim, model = vars(stored["data"]), vars(stored["optim"]), stored["model"]
    asked = [key for key, value in (("steps", stored["steps"]), ("data.batch", data["batch"])) if value == AUTO]
    for schedule in config.sections(recipe):
        if isinstance(schedule, Schedule) and vars(schedule)["value"] == AUTO:
            if schedule is not optim["lr"]:
                raise ConfigError("value = auto: of all schedules only optim.lr can be derived; write a number")
            asked.append("optim.lr.value")
    if not asked:
        return []
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"{asked[0]} = auto: is derived for decoders (model=gpt), not for model.name = {model.name}; write a number"
        )
    tokens, step, rate = budget(model)
    length = data["length"] or model.context
    lines = []
    if "data.batch" in asked:
        stored["data"].batch = max(1, step // length)
        lines.append(
            f"data.batch = {data['batch']} (auto: {step:,} tokens in rows of {length}, by 0.2920 · C^0.3271 of the run's FLOPs)"
        )
    if "steps" in asked:
        recipe.steps = max(1, round(tokens / (data["batch"] * length)))  # type: ignore[attr-defined]
        lines.append(
            f"steps = {stored['steps']} (auto: {tokens:,} tokens, {TOKENS} for each of {tokens // TOKENS:,} weights)"
        )
    if "optim.lr.value" in asked:
        optim["lr"].value = float(f"{rate:.3g}")
        lines.append(f"optim.lr.value = {optim['lr'].value} (auto: 0.3118 · C^-0.125 of the run's FLOPs)")
    return lines
