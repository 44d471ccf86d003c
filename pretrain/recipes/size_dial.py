"""The size dial of decoders: `auto` for the steps, the batch or the learning rate of a recipe is replaced by a value
that is computed from `model.depth`.

    width = 64 · depth, in heads of 64 (pretrain/models/families.py)
    N = number of weights in all matrices and the head, without embeddings
    D = 12 · N, the number of tokens of the run (nanochat; Chinchilla's ratio of 20 also counts embeddings)
    C = 6 · N · D, the number of FLOPs of the run
    batch = 0.2920 · C^0.3271 tokens, rounded to a power of 2
    lr = 0.3118 · C^-0.1250

The last two are equation 1 of DeepSeek LLM (arXiv 2401.02954), which was fitted between 1e17 and 2e19 FLOPs: depths of
8 to 16. Muon's updates have the same size as AdamW's (pretrain/optim/muon.py), so both use this rate.
"""

from __future__ import annotations

import math

from common import config
from common.config import Section
from common.errors import ConfigError
from common.schedules import Schedule
from pretrain.models.families import Decoder, decoder_sizes

AUTO = "auto"
TOKENS_PER_WEIGHT = 12


def weights(cfg: Decoder) -> int:
    """N, the number of weights by which each token is multiplied."""
    dim, heads, kv_heads, head_dim, width = decoder_sizes(cfg)
    attention = dim * head_dim * (2 * heads + 2 * kv_heads)
    return cfg.depth * (attention + (3 if cfg.mlp == "swiglu" else 2) * dim * width) + dim * cfg.vocab_size


def budget(cfg: Decoder) -> tuple[int, int, float]:
    """(number of tokens of the run, number of tokens of a step, learning rate)."""
    n = weights(cfg)
    tokens = TOKENS_PER_WEIGHT * n
    compute = 6.0 * n * tokens
    return tokens, 2 ** round(math.log2(0.2920 * compute**0.3271)), 0.3118 * compute**-0.1250


def derive(recipe: Section) -> list[str]:
    """Replace every `auto` that the size dial derives. Returns a line "key = value (auto: rule)" for each.

    Raises ConfigError if `auto` is written for another option, or for a model that is no decoder.
    """
    stored = vars(recipe)
    data, optim, model = vars(stored["data"]), vars(stored["optim"]), stored["model"]
    keys = [key for key, value in (("steps", stored["steps"]), ("data.batch", data["batch"])) if value == AUTO]
    for schedule in config.sections(recipe):
        if isinstance(schedule, Schedule) and vars(schedule)["value"] == AUTO:
            if schedule is not optim["lr"]:
                raise ConfigError("value = auto: of all schedules only optim.lr can be derived; write a number")
            keys.append("optim.lr.value")
    if not keys:
        return []
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"{keys[0]} = auto: is derived for decoders (model=gpt), not for model.name = {model.name}; write a number"
        )
    run_tokens, step_tokens, rate = budget(model)
    length = data["length"] or model.context
    lines = []
    if "data.batch" in keys:
        stored["data"].batch = max(1, step_tokens // length)
        lines.append(
            f"data.batch = {data['batch']} (auto: {step_tokens:,} tokens in rows of {length}, by 0.2920 · C^0.3271 of"
            " the run's FLOPs)"
        )
    if "steps" in keys:
        recipe.steps = max(1, round(run_tokens / (data["batch"] * length)))  # type: ignore[attr-defined]
        lines.append(
            f"steps = {stored['steps']} (auto: {run_tokens:,} tokens, {TOKENS_PER_WEIGHT} for each of"
            f" {run_tokens // TOKENS_PER_WEIGHT:,} weights)"
        )
    if "optim.lr.value" in keys:
        optim["lr"].value = float(f"{rate:.3g}")
        lines.append(f"optim.lr.value = {optim['lr'].value} (auto: 0.3118 · C^-0.125 of the run's FLOPs)")
    return lines
